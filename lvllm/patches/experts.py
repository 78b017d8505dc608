"""Experts that vLLM would compute, or refuse, without asking LvLLM."""

from typing import Any

from lvllm.errors import LayerError
from lvllm.patches.registry import patch

__all__ = ["allow_experts_without_gate", "refuse_unknown_experts"]


@patch(
    "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts._get_quant_method",
    signature="(self, prefix, quant_config, moe_config)",
    why="vLLM replaces layers by class name, so a model's own subclass of RoutedExperts is not"
    " replaced. Its experts would run on vLLM's kernels without a word. It is refused instead,"
    " unless its layer is resident.",
    upstream="none, because vLLM documents replacing by class name, and a subclass that no plugin"
    " knows is an error only for LvLLM",
    until="vLLM asks its platform or a plugin for the method of every layer of experts",
)
def refuse_unknown_experts(original: Any) -> Any:
    # This import also keeps vLLM's own method, so it must come before the replacement.
    from lvllm.moe import resident

    def _get_quant_method(layer: Any, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        if resident.is_resident(prefix):
            return resident.resident_method(layer, prefix, quant_config, moe_config)
        raise LayerError(
            f"{prefix}: experts of the class {type(layer).__name__} are not supported with"
            " LVLLM_MOE_NUMA_ENABLED=1 yet; unset it for stock vLLM"
        )

    return _get_quant_method


@patch(
    "vllm.model_executor.layers.fused_moe.config:FusedMoEConfig.__post_init__",
    signature="(self)",
    why="On the CPU vLLM refuses experts without a gate projection, because its kernels need one."
    " lk's kernels do not.",
    upstream="none, because vLLM's CPU kernels do not need the change",
    until="the method of a layer, and not its configuration, refuses such experts",
    platform="cpu",
)
def allow_experts_without_gate(original: Any) -> Any:
    from lvllm.settings.configuration import HybridConfig

    def __post_init__(self: Any) -> None:
        # The refusal is the last thing that vLLM does here, so nothing is skipped.
        try:
            original(self)
        except NotImplementedError:
            if self.is_act_and_mul or HybridConfig.current_or_none() is None:
                raise

    return __post_init__

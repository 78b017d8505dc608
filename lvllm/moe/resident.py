"""Resident layers: MoE layers whose experts stay on the accelerator."""

from typing import Any

from vllm.compilation import backends
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.platforms import current_platform

from lvllm import formats
from lvllm.checkpoint.moe_layers import layer_number
from lvllm.errors import LayerError
from lvllm.log import logger
from lvllm.moe.resident_method import ResidentMoEMethod
from lvllm.settings.configuration import HybridConfig

__all__ = ["is_resident", "resident_method"]

_upstream_method = RoutedExperts._get_quant_method
"""vLLM's own function. `lvllm.patches.experts` replaces it in vLLM's class."""


def is_resident(prefix: str) -> bool:
    """Whether vLLM computes the experts called `prefix` of the model that is being built.

    Outside an engine it computes all, as without LvLLM. Without an accelerator it computes none.
    With one, it computes the layers that LVLLM_GPU_RESIDENT_MOE_LAYERS names, and all layers of a
    draft model. A draft's few layers run for every token, and some have the same numbers as layers
    of the model itself.
    """
    config = HybridConfig.current_or_none()
    if config is None:
        return True
    if config.accelerator == "none":
        return False
    return _is_draft() or layer_number(prefix) in config.gpu_resident_moe_layers


def _is_draft() -> bool:
    """Whether the model that is being built is a draft; vLLM's compiler tag says so."""
    return backends.model_tag != "backbone"


def resident_method(
    layer: Any, prefix: str, quant_config: Any, moe_config: FusedMoEConfig
) -> FusedMoEMethodBase:
    """The method for the resident experts of `layer`, called `prefix`.

    It is vLLM's own. Where vLLM cannot compute these experts on its platform, it is LvLLM's, if
    that reads their format. Outside an engine, vLLM's own errors pass.

    Raises LayerError if neither can.
    """
    if HybridConfig.current_or_none() is None:
        return _upstream_method(layer, prefix, quant_config, moe_config)
    try:
        if current_platform.is_cpu() and not moe_config.is_act_and_mul:
            # vLLM itself would refuse these experts, but a patch lifts that refusal for lk.
            raise NotImplementedError("its kernels need a gate")
        if current_platform.is_cpu() and moe_config.moe_parallel_config.use_ep:
            # The kernels do not know that a rank holds only some experts, so they would read beyond
            # the end of the weights.
            raise NotImplementedError("its kernels know no expert parallelism")
        if current_platform.is_cpu() and moe_config.is_lora_enabled:
            # vLLM would use Triton kernels here, without checking that Triton is installed.
            raise NotImplementedError("of its kernels those for models with LoRA need a GPU")
        return _upstream_method(layer, prefix, quant_config, moe_config)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    device = current_platform.device_name
    remedy = f"leave {layer_number(prefix)} out of LVLLM_GPU_RESIDENT_MOE_LAYERS"
    if _is_draft():
        remedy = "leave speculative-config out, as a draft's layers are resident"
    try:
        weight_format = formats.find(quant_config, layer, prefix)
        method = ResidentMoEMethod(moe_config, weight_format, prefix, remedy)
    except ValueError as error:
        raise LayerError(
            f"{prefix}: vLLM cannot compute these experts on {device}, where they are to be"
            f" resident: {why}; nor can LvLLM: {error}; {remedy}"
        ) from error
    logger.info_once(
        "LvLLM: vLLM cannot compute this model's resident experts on %s, so that LvLLM's kernels"
        " do (%s)",
        device,
        why,
    )
    return method

"""The out-of-tree layers: vLLM's routed experts, with LvLLM's method in place of vLLM's.

Registration goes by class name, so a model's own subclass is replaced by one of ours.
"""

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts
from vllm.model_executor.models.transformers.moe import TransformersRoutedExperts
from vllm.platforms import current_platform

from lvllm import formats
from lvllm.checkpoint.moe_layers import layer_number
from lvllm.moe.method import HybridMoEMethod
from lvllm.settings.configuration import HybridConfig

__all__ = ["REPLACED", "HybridExperts", "HybridRoutedExperts"]


_upstream_method = RoutedExperts._get_quant_method
"""vLLM's own choice of a method, before `lvllm.plugin` puts a refusal into its place."""


def is_resident(prefix: str) -> bool:
    """Whether the experts called `prefix`, of the model that is being built, stay with vLLM.

    With an accelerator, those of the layers that LVLLM_GPU_RESIDENT_MOE_LAYERS names do, and all
    that draft: a draft's few layers run for every token, and some are numbered like the model's.
    """
    config = HybridConfig.current()
    if config.accelerator == "none":
        return False
    return _is_draft() or layer_number(prefix) in config.gpu_resident_moe_layers


def _is_draft() -> bool:
    """Whether the model that is being built drafts: vLLM names it for its compiler."""
    from vllm.compilation import backends

    return backends.model_tag != "backbone"


class HybridExperts:
    """Routed experts whose weights lie in the engine's memory, unless their layer is resident.

    The name of a weight's owner and the whole of loading stay upstream's; only the quantisation
    method differs, and through it where parameters are made and who computes on them. A resident
    layer has upstream's method, too.
    """

    resident: bool

    def _get_quant_method(
        self, prefix: str, quant_config: Any, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        self.resident = is_resident(prefix)
        if self.resident:
            return resident_method(self, prefix, quant_config, moe_config)
        return HybridMoEMethod(moe_config, formats.find(quant_config, self, prefix), prefix)

    def _narrow_expert_data_for_padding(
        self, expert_data: torch.Tensor, loaded_weight: torch.Tensor, *more: Any, **options: Any
    ) -> torch.Tensor:
        """Upstream takes a tensor that is too small, for its kernels that pad; lk's do not."""
        if self.resident:
            narrow = super()._narrow_expert_data_for_padding  # type: ignore[misc]
            narrowed: torch.Tensor = narrow(expert_data, loaded_weight, *more, **options)
            return narrowed
        if loaded_weight.dim() == expert_data.dim() and loaded_weight.shape != expert_data.shape:
            raise ValueError(
                f"does not fit the model: this process takes {list(expert_data.shape)} of it"
            )
        return expert_data


def resident_method(
    layer: Any, prefix: str, quant_config: Any, moe_config: FusedMoEConfig
) -> FusedMoEMethodBase:
    """Upstream's method for the experts of `layer`, called `prefix`.

    Raises ValueError, in one line that names the layer, where upstream has none on its platform.
    """
    try:
        if current_platform.is_cpu() and not moe_config.is_act_and_mul:
            # vLLM refuses them there; `lvllm.plugin` lifts that for lk.
            raise NotImplementedError("its kernels need a gate")
        if current_platform.is_cpu() and moe_config.moe_parallel_config.use_ep:
            # They take any expert for one of this rank's, and read behind their memory.
            raise NotImplementedError("its kernels know no expert parallelism")
        if current_platform.is_cpu() and moe_config.is_lora_enabled:
            # It takes Triton's for them, and does not ask whether there are any.
            raise NotImplementedError("of its kernels those for models with LoRA need a GPU")
        return _upstream_method(layer, prefix, quant_config, moe_config)
    except Exception as error:
        number = layer_number(prefix)
        remedy = f"leave {number} out of LVLLM_GPU_RESIDENT_MOE_LAYERS"
        if _is_draft():
            remedy = "leave speculative-config out, as a draft's layers are resident"
        raise ValueError(
            f"{prefix}: vLLM cannot compute these experts on {current_platform.device_name}, where"
            f" they are to be resident: {type(error).__name__}: {error}; {remedy}"
        ) from error


class HybridRoutedExperts(HybridExperts, RoutedExperts):
    """Those of most models."""


class HybridGptOssExperts(HybridExperts, GptOssRoutedExperts):
    """Those of gpt-oss."""

    def _get_quant_method(
        self, prefix: str, quant_config: Any, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        if not is_resident(prefix):
            # vLLM takes the constants of OpenAI's own checkpoints; config.json may have others.
            config = get_current_vllm_config().model_config.hf_config
            moe_config.swiglu_alpha = getattr(config, "swiglu_alpha", None)
            moe_config.swiglu_limit = getattr(config, "swiglu_limit", None)
        return super()._get_quant_method(prefix, quant_config, moe_config)


class HybridTransformersExperts(HybridExperts, TransformersRoutedExperts):
    """Those of models that run through vLLM's Transformers backend."""


REPLACED: dict[type[RoutedExperts], type[RoutedExperts]] = {
    RoutedExperts: HybridRoutedExperts,
    GptOssRoutedExperts: HybridGptOssExperts,
    TransformersRoutedExperts: HybridTransformersExperts,
}
"""vLLM's classes, and what takes their place."""

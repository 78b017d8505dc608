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

from lvllm import formats
from lvllm.moe_method import HybridMoEMethod

__all__ = ["REPLACED", "HybridExperts", "HybridRoutedExperts"]


class HybridExperts:
    """Routed experts whose weights lie in the engine's memory.

    The name of a weight's owner and the whole of loading stay upstream's; only the quantisation
    method differs, and through it where parameters are made and who computes on them.
    """

    def _get_quant_method(
        self, prefix: str, quant_config: Any, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        return HybridMoEMethod(moe_config, formats.find(quant_config, self, prefix), prefix)

    @staticmethod
    def _narrow_expert_data_for_padding(
        expert_data: torch.Tensor, loaded_weight: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """Upstream takes a tensor that is too small, for its kernels that pad; nothing is here."""
        if loaded_weight.dim() == expert_data.dim() and loaded_weight.shape != expert_data.shape:
            raise ValueError(
                f"does not fit the model: this process takes {list(expert_data.shape)} of it"
            )
        return expert_data


class HybridRoutedExperts(HybridExperts, RoutedExperts):
    """Those of most models."""


class HybridGptOssExperts(HybridExperts, GptOssRoutedExperts):
    """Those of gpt-oss."""

    def _get_quant_method(
        self, prefix: str, quant_config: Any, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
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

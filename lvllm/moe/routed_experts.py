"""The classes that replace vLLM's routed experts, with LvLLM's method in place of vLLM's.

vLLM registers replacements (out-of-tree layers) by class name. So each subclass of RoutedExperts
that a model brings along needs a replacement of its own.
"""

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts
from vllm.model_executor.models.transformers.moe import TransformersRoutedExperts

from lvllm import formats
from lvllm.errors import naming_layer
from lvllm.moe.method import HybridMoEMethod
from lvllm.moe.resident import is_resident, resident_method

__all__ = ["REPLACED", "HybridExperts", "HybridRoutedExperts"]


class HybridExperts:
    """Routed experts whose weights lie in the engine's memory, unless their layer is resident.

    The names of the weights and the way they are loaded stay vLLM's. Only the quantisation method
    differs: it allocates the parameters and computes on them. A resident layer has vLLM's own
    method where there is one.
    """

    resident: bool

    def _get_quant_method(
        self, prefix: str, quant_config: Any, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        self.resident = is_resident(prefix)
        if self.resident:
            return resident_method(self, prefix, quant_config, moe_config)
        with naming_layer(prefix):
            return HybridMoEMethod(moe_config, formats.find(quant_config, self, prefix), prefix)


class HybridRoutedExperts(HybridExperts, RoutedExperts):
    """The routed experts of most models."""


class HybridGptOssExperts(HybridExperts, GptOssRoutedExperts):
    """The routed experts of gpt-oss."""

    def _get_quant_method(
        self, prefix: str, quant_config: Any, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        if not is_resident(prefix):
            # vLLM uses the constants of OpenAI's checkpoints, but config.json may have others.
            config = get_current_vllm_config().model_config.hf_config
            moe_config.swiglu_alpha = getattr(config, "swiglu_alpha", None)
            moe_config.swiglu_limit = getattr(config, "swiglu_limit", None)
        return super()._get_quant_method(prefix, quant_config, moe_config)


class HybridTransformersExperts(HybridExperts, TransformersRoutedExperts):
    """The routed experts of models that run through vLLM's Transformers backend."""


REPLACED: dict[type[RoutedExperts], type[RoutedExperts]] = {
    RoutedExperts: HybridRoutedExperts,
    GptOssRoutedExperts: HybridGptOssExperts,
    TransformersRoutedExperts: HybridTransformersExperts,
}
"""For each of vLLM's classes, the class that replaces it."""

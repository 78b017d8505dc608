"""The out-of-tree layer: vLLM's routed experts, with LvLLM's method in place of vLLM's."""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from lvllm import formats
from lvllm.moe_method import HybridMoEMethod


class HybridRoutedExperts(RoutedExperts):
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

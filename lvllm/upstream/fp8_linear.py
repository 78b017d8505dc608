"""FP8 linear layers for CPUs without AMX, where upstream has no kernel for 128 x 128 scales.

Attention and shared experts are a small part of a mixture's weights: they are turned to the model's
dtype once, and multiplied like any others.
"""

from typing import Any

import torch
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
    Fp8BlockScaledMMLinearKernel,
)
from vllm.model_executor.utils import replace_parameter

__all__ = ["DequantizedFp8Linear"]


class DequantizedFp8Linear(Fp8BlockScaledMMLinearKernel):
    """weight [N, K] in e4m3 with a float32 scale for each block; activations stay as they are."""

    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """On every CPU."""
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        """Any shape and block."""
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the weights by their values in the model's dtype."""
        params = self._get_layer_params(layer)
        rows, columns = params.weight.shape
        block_rows, block_columns = self.weight_group_shape
        scale = params.block_scale.data.float()
        scale = scale.repeat_interleave(block_rows, dim=0)[:rows]
        scale = scale.repeat_interleave(block_columns, dim=1)[:, :columns]
        values = (params.weight.data.float() * scale).to(self.config.out_dtype)
        replace_parameter(layer, params.WEIGHT, values)
        # Latent attention takes kv_b_proj apart, and multiplies by the scales of what was FP8.
        params.block_scale.data.fill_(1)

    def apply_weights(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        return torch.nn.functional.linear(x, layer.weight, bias)

    def apply_block_scaled_mm(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Not called: weights have no scales any more."""
        raise NotImplementedError

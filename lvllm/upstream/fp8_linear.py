"""FP8 linear layers for CPUs without AMX, where vLLM has no kernel for 128 x 128 block scales.

Attention and shared experts are a small part of the weights of a Mixture-of-Experts model. They are
dequantised to the model's dtype once, and then multiplied like any other weights.
`lvllm.patches.kernels` offers this layer to vLLM.
"""

from typing import Any

import torch
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
    Fp8BlockScaledMMLinearKernel,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.utils import replace_parameter

__all__ = ["DequantizedFp8Linear"]


class DequantizedFp8Linear(Fp8BlockScaledMMLinearKernel):
    """A layer with weight [N, K] in e4m3 and a float32 scale for each block of it.

    Activations are not quantised.
    """

    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Return that the layer runs on every CPU."""
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        """Return that any shape and block size will do."""
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the FP8 weights by their values in the model's dtype."""
        params = self._get_layer_params(layer)
        rows, columns = params.weight.shape
        block_rows, block_columns = self.weight_group_shape
        scale = params.block_scale.data.float()
        scale = scale.repeat_interleave(block_rows, dim=0)[:rows]
        scale = scale.repeat_interleave(block_columns, dim=1)[:, :columns]
        values = (params.weight.data.float() * scale).to(self.config.out_dtype)
        replace_parameter(layer, params.WEIGHT, values)
        # Multi-head latent attention (MLA) splits kv_b_proj, and multiplies by the scales of a
        # layer that was FP8.
        params.block_scale.data.fill_(1)
        UnquantizedLinearMethod().process_weights_after_loading(layer)

    def apply_weights(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Return the product of x [..., K] and the weights, [..., N]."""
        y: torch.Tensor = layer.cpu_linear(x, layer.weight, bias)
        return y

    def apply_block_scaled_mm(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Refuse: this is never called, since the weights have no scales any more."""
        raise NotImplementedError

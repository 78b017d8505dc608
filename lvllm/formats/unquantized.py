"""bfloat16 and float16 experts: the checkpoint's bytes, in the checkpoint's order."""

from typing import Any

import torch
from torch.nn import Module

from lvllm.formats.base import ExpertFormat, Shape, add_weights

__all__ = ["Unquantized", "find"]


def find(quant_config: Any, layer: Any, prefix: str) -> "Unquantized | None":
    """Plain experts, of an unquantised checkpoint."""
    return Unquantized() if quant_config is None else None


class Unquantized(ExpertFormat):
    """w13_weight [E, 2I, H] (gate rows, then up rows) and w2_weight [E, H, I]."""

    bits = 16

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        add_weights(layer, shape, "weight", dtype, attributes)

    def tensors(self, layer: Any) -> dict[str, Any]:
        format = {torch.bfloat16: "bf16", torch.float16: "fp16"}[layer.w13_weight.dtype]
        return {"format": format, "w13": layer.w13_weight.data, "w2": layer.w2_weight.data}

"""bfloat16 and float16 experts, which the engine computes in the checkpoint's own layout."""

from typing import Any

import torch
from torch.nn import Module

from lvllm.formats.base import ExpertFormat, Shape, add_weights
from lvllm.formats.descriptor import PLAIN, Descriptor

__all__ = ["DESCRIPTOR", "Unquantized", "find"]

DESCRIPTOR = Descriptor("unquantised bfloat16 and float16", stored=lambda section, module: PLAIN)


def find(quant_config: Any, layer: Any, prefix: str) -> "Unquantized | None":
    """Experts of a checkpoint that is not quantised, even if vLLM's options ask for that."""
    stored = quant_config is None or quant_config.get_name() == "online"
    return Unquantized() if stored else None


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

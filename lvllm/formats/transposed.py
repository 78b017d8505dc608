"""Integer experts that lie transposed in the checkpoint: AutoAWQ's and GPTQ's.

A packed expert has as many bytes as the engine's. So the loader fills a view of the engine's memory
with the checkpoint's shape, and each expert is turned in place when all are loaded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported

from lvllm import bank
from lvllm.engine import ExpertLayer
from lvllm.formats import packing
from lvllm.formats.base import Shape, add_parameter, check_scales, engine_layer, narrow

__all__ = ["TransposedInts"]

Turn = Callable[[torch.Tensor], torch.Tensor]


class TransposedInts:
    """scales [E, groups, rows]; qzeros int32 [E, groups, rows * bits / 32]; qweight int32, packed
    along the rows [E, columns, rows * bits / 32] or the columns [E, columns * bits / 32, rows].

    Args:
        bits: 4 or 8. Of 8, one group is a row.
        group_size: -1 is a row.
        along_rows: how qweight is packed.
        turn: makes the engine's codes of one expert's qweight.
        turn_zeros: the same for qzeros. None: zero points are in the middle, and qzeros is left.
        left: further parameters, int32 [E, columns], that are read and not used.
    """

    def __init__(
        self,
        bits: int,
        group_size: int,
        *,
        along_rows: bool,
        turn: Turn,
        turn_zeros: Turn | None = None,
        left: tuple[str, ...] = (),
    ) -> None:
        self.bits = bits
        self.group_size = group_size
        self.along_rows = along_rows
        self.turn = turn
        self.turn_zeros = turn_zeros
        self.left = left
        self.dtype = torch.uint8 if bits == 4 else torch.int8

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        how = FusedMoeWeightScaleSupported.GROUP.value
        more = {"is_transposed": True, "quant_method": how}
        per_word = 32 // self.bits
        experts = shape.experts
        for name, parts, rows, columns in shape.matrices:
            size = columns if self.group_size == -1 else self.group_size
            if rows % (8 * parts) != 0 or columns % size != 0 or columns % per_word != 0:
                raise ValueError(
                    f"{name} has {rows} x {columns} weights in this process, wanted multiples of"
                    f" {8 * parts} and of {size} and {per_word}"
                )
            codes = bank.allocate(
                (experts, rows, columns * self.bits // 8), self.dtype, parts=parts
            )
            packed = (columns, rows // per_word) if self.along_rows else (columns // per_word, rows)
            words = codes.view(torch.int32).view(experts, *packed)
            add_parameter(layer, f"{name}_qweight", words, attributes, **more)
            groups = columns // size
            scale = torch.full((experts, groups, rows), torch.nan, dtype=torch.float32)
            add_parameter(layer, f"{name}_scales", scale, attributes, **more)
            zero = torch.zeros((experts, groups, rows // per_word), dtype=torch.int32)
            add_parameter(layer, f"{name}_qzeros", zero, attributes, **more)
            for left in self.left:
                unused = torch.empty((experts, columns), dtype=torch.int32)
                add_parameter(layer, f"{name}_{left}", unused, attributes, **more)

    def finalize(self, layer: Any) -> ExpertLayer:
        codes = []
        more: dict[str, Any] = {}
        for name, scales in zip(("w13", "w2"), check_scales(layer, "scales"), strict=True):
            words = getattr(layer, f"{name}_qweight").data
            turned = words.view(self.dtype).view(len(words), scales.shape[2], -1)
            for expert, of_expert in enumerate(words):
                turned[expert].copy_(self.turn(of_expert))
            codes.append(turned)
            scale = torch.stack([packing.group_scale(of_expert) for of_expert in scales])
            more[f"{name}_scale"] = narrow(scale) if self.bits == 4 else scale.squeeze(-1)
            if self.turn_zeros is not None:
                zeros = getattr(layer, f"{name}_qzeros").data
                more[f"{name}_zero"] = torch.stack([self.turn_zeros(zero) for zero in zeros])
        if self.bits == 4:
            more["group_size"] = self.group_size
        return engine_layer(layer, "int4" if self.bits == 4 else "int8", *codes, **more)

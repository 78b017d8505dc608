"""Integer experts that lie transposed in the checkpoint: AutoAWQ's and GPTQ's.

A packed expert has as many bytes as the engine's. So the loader fills a view of the engine's memory
with the checkpoint's shape, and each expert is turned in place when all are loaded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported

from lvllm.formats import integers, packing
from lvllm.formats.base import ExpertFormat, Shape, add_parameter, check_scales

__all__ = ["TransposedInts"]

Turn = Callable[[torch.Tensor], torch.Tensor]


class TransposedInts(ExpertFormat):
    """scales [E, groups, rows]; qzeros int32 [E, groups, rows * bits / 32]; qweight int32, packed
    along the rows [E, columns, rows * bits / 32] or the columns [E, columns * bits / 32, rows].

    Args:
        bits: 4 or 8.
        group_size: -1 is a row.
        along_rows: how qweight is packed.
        turn: makes the engine's codes of one expert's qweight.
        turn_zeros: the same for qzeros. None: zero points are in the middle, and qzeros is left.
        ordered: whether g_idx, int32 [columns], says in which group each is; else it is left.
    """

    def __init__(
        self,
        bits: int,
        group_size: int,
        *,
        along_rows: bool,
        turn: Turn,
        turn_zeros: Turn | None = None,
        ordered: bool = False,
    ) -> None:
        self.bits = bits
        self.group_size = None if group_size == -1 else group_size
        self.along_rows = along_rows
        self.turn = turn
        self.turn_zeros = turn_zeros
        self.ordered = ordered and self.group_size is not None
        self.dtype = torch.uint8 if bits == 4 else torch.int8
        self.computable = not self.ordered and integers.computable(
            bits, self.group_size, symmetric=turn_zeros is None
        )

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        how = FusedMoeWeightScaleSupported.GROUP.value
        more = {"is_transposed": True, "quant_method": how}
        per_word = 32 // self.bits
        experts = shape.experts
        for name, parts, rows, columns in shape.matrices:
            # Act-order asks nothing of this process's columns.
            size = per_word if self.ordered else self.group_size or columns
            if rows % (per_word * parts) != 0 or columns % size != 0 or columns % per_word != 0:
                raise ValueError(
                    f"{name} has {rows} x {columns} weights in this process, wanted multiples of"
                    f" {per_word * parts} and of {size} and {per_word}"
                )
            codes = shape.allocate(
                (experts, rows, columns * self.bits // 8), self.dtype, parts=parts
            )
            packed = (columns, rows // per_word) if self.along_rows else (columns // per_word, rows)
            words = codes.view(torch.int32).view(experts, *packed)
            add_parameter(layer, f"{name}_qweight", words, attributes, **more)
            groups = integers.groups_of(layer, name, columns, self.group_size, self.ordered)
            whole = more | integers.whole(name, self.ordered)
            scale = torch.full((experts, groups, rows), torch.nan, dtype=torch.float32)
            add_parameter(layer, f"{name}_scales", scale, attributes, **whole)
            zero = torch.zeros((experts, groups, rows // per_word), dtype=torch.int32)
            unused = self.turn_zeros is None
            add_parameter(layer, f"{name}_qzeros", zero, attributes, optional=unused, **whole)
        if not self.along_rows:
            integers.add_order(layer, shape, "g_idx", attributes, optional=not self.ordered)

    def tensors(self, layer: Any) -> dict[str, Any]:
        codes, scales, zeros, order = {}, {}, {}, {}
        of_both = check_scales(layer, "scales")
        for name, of_layer in zip(("w13", "w2"), of_both, strict=True):
            words = getattr(layer, f"{name}_qweight").data
            codes[name] = words.view(self.dtype).view(len(words), of_layer.shape[2], -1)
            for expert, of_expert in enumerate(words):
                codes[name][expert].copy_(self.turn(of_expert))
            scales[name] = torch.stack([packing.group_scale(of_expert) for of_expert in of_layer])
            if self.turn_zeros is not None:
                packed = getattr(layer, f"{name}_qzeros").data
                zeros[name] = torch.stack([self.turn_zeros(zero) for zero in packed])
            if self.ordered:
                order[name] = getattr(layer, f"{name}_g_idx").data
        return integers.tensors(self.bits, self.group_size, codes, scales, zeros, order)

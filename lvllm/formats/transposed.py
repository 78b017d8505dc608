"""Integer experts that lie transposed in the checkpoint: AutoAWQ's and GPTQ's.

A packed expert takes as many bytes as the engine's. So vLLM's loader fills a view of the engine's
memory that has the checkpoint's shape, and when all are loaded, each expert is repacked in place.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from lvllm.formats import integers, packing
from lvllm.formats.base import ExpertFormat, Shape, add_parameter, check_scales

__all__ = ["Repack", "TransposedInts"]

Repack = Callable[[torch.Tensor], torch.Tensor]


class TransposedInts(ExpertFormat):
    """Experts stored as qweight, scales and qzeros, transposed.

    scales are [E, groups, rows]; qzeros int32 [E, groups, rows * bits / 32]; qweight is int32,
    packed along the rows [E, columns, rows * bits / 32] or the columns [E, columns * bits / 32,
    rows].

    Args:
        bits: 4 or 8.
        group_size: columns in a group; -1: all of a row.
        packed_along_rows: whether a word of qweight holds codes of one column; else of one row.
        repack: makes the engine's codes from one expert's qweight.
        repack_zeros: makes the engine's zero points from one expert's qzeros. None: zero points are
            in the middle, and qzeros is ignored.
        act_order: whether g_idx, int32 [columns], says which group each column is in. If not, it is
            ignored.
    """

    def __init__(
        self,
        bits: int,
        group_size: int,
        *,
        packed_along_rows: bool,
        repack: Repack,
        repack_zeros: Repack | None = None,
        act_order: bool = False,
    ) -> None:
        self.bits = bits
        self.group_size = None if group_size == -1 else group_size
        self.packed_along_rows = packed_along_rows
        self.repack = repack
        self.repack_zeros = repack_zeros
        self.act_order = act_order and self.group_size is not None
        self.dtype = torch.uint8 if bits == 4 else torch.int8
        self.computable = not self.act_order and integers.computable(
            bits, self.group_size, symmetric=repack_zeros is None
        )

    def create_weights(
        self, layer: Module, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        more = {"is_transposed": True, "quant_method": "group"}
        per_word = 32 // self.bits
        experts = shape.experts
        for name, parts, rows, columns in shape.matrices:
            # With act-order the columns of this process need not begin with a group.
            size = per_word if self.act_order else self.group_size or columns
            if rows % (per_word * parts) != 0 or columns % size != 0 or columns % per_word != 0:
                raise ValueError(
                    f"{name} has {rows} x {columns} weights in this process, wanted multiples of"
                    f" {per_word * parts} and of {size} and {per_word}"
                )
            codes = shape.allocate(
                (experts, rows, columns * self.bits // 8), self.dtype, parts=parts
            )
            packed = (columns // per_word, rows)
            if self.packed_along_rows:
                packed = (columns, rows // per_word)
            words = codes.view(torch.int32).view(experts, *packed)
            add_parameter(layer, f"{name}_qweight", words, attributes, **more)
            groups = integers.groups_of(layer, name, columns, self.group_size, self.act_order)
            whole = more | integers.whole(name, self.group_size, self.act_order)
            scale = torch.full((experts, groups, rows), torch.nan, dtype=torch.float32)
            add_parameter(layer, f"{name}_scales", scale, attributes, **whole)
            zero = torch.zeros((experts, groups, rows // per_word), dtype=torch.int32)
            unused = self.repack_zeros is None
            add_parameter(layer, f"{name}_qzeros", zero, attributes, optional=unused, **whole)
        if not self.packed_along_rows:
            optional = not self.act_order
            integers.add_group_index(layer, shape, "g_idx", attributes, optional=optional)

    def tensors(self, layer: Any) -> dict[str, Any]:
        codes, scales, zeros, group_index = {}, {}, {}, {}
        of_both = check_scales(layer, "scales")
        for name, of_layer in zip(("w13", "w2"), of_both, strict=True):
            words = getattr(layer, f"{name}_qweight").data
            codes[name] = words.view(self.dtype).view(len(words), of_layer.shape[2], -1)
            for expert, of_expert in enumerate(words):
                codes[name][expert].copy_(self.repack(of_expert))
            scales[name] = torch.stack([packing.group_scale(of_expert) for of_expert in of_layer])
            if self.repack_zeros is not None:
                packed = getattr(layer, f"{name}_qzeros").data
                zeros[name] = torch.stack([self.repack_zeros(zero) for zero in packed])
            if self.act_order:
                group_index[name] = getattr(layer, f"{name}_g_idx").data
        return integers.tensors(self.bits, self.group_size, codes, scales, zeros, group_index)

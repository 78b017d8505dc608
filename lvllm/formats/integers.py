"""What all formats of packed integers have in common: groups along K, of any size, in any order.

With act-order, a checkpoint says for each column which group it is in. Any column may then need any
scale, so a process that holds some of w2's columns needs the scales of all groups.
"""

from typing import Any

import torch

from lvllm.engine import weight_formats
from lvllm.formats.base import Shape, add_parameter, narrow, place_whole, wrong_shape
from lvllm.formats.descriptor import Stored

__all__ = [
    "INT4_BITS",
    "INT4_GROUP",
    "add_group_index",
    "computable",
    "groups_of",
    "stored",
    "tensors",
    "whole",
]

INT4_GROUP = 32
"""Columns that share a scale in the experts that LVLLM_MOE_USE_WEIGHT=INT4 makes."""
INT4_BITS = 4 + 16 / INT4_GROUP
"""Bits of a weight of those experts, with its share of the 16-bit scale."""

OfBoth = dict[str, torch.Tensor]
"""One tensor for "w13" and one for "w2"."""


def computable(bits: int, group_size: int | None, *, symmetric: bool) -> bool:
    """Whether lk computes groups of `group_size` columns (None: a row) as they are stored."""
    if bits == 8 and not symmetric:
        return False
    return group_size is None or any(
        group_size % group == 0 for group in weight_formats.GROUP_SIZES
    )


def stored(
    bits: int, group_size: int | None, *, symmetric: bool, act_order: bool = False
) -> Stored:
    """The answer of a `Descriptor` for integers; a `group_size` of None or -1 is a row."""
    if group_size in (None, -1):
        return Stored(bits, computable(bits, None, symmetric=symmetric))
    return Stored(bits, not act_order and computable(bits, group_size, symmetric=symmetric))


def groups_of(layer: Any, name: str, columns: int, group_size: int | None, act_order: bool) -> int:
    """How many groups of a row this process needs of w13 or w2, of which it has `columns`."""
    if act_order and name == "w2":
        columns *= layer.moe_config.moe_parallel_config.tp_size
    return columns // group_size if group_size else 1


def whole(name: str, group_size: int | None, act_order: bool) -> dict[str, Any]:
    """The attribute of a parameter that makes its loader copy the scales or zero points of all
    groups, where this process needs all of them.
    """
    if name == "w2" and (act_order or group_size is None):
        return {"place": place_whole}
    return {}


def add_group_index(
    layer: Any, shape: Shape, suffix: str, attributes: dict[str, Any], *, optional: bool = False
) -> None:
    """Register w13_SUFFIX and w2_SUFFIX, int32 [E, parts, columns]: the group of each column."""
    rank, ranks = layer.moe_config.tp_rank, layer.moe_config.moe_parallel_config.tp_size

    def place(data: torch.Tensor, expert: int, loaded: torch.Tensor, shard: str) -> None:
        columns = data.shape[2]
        wanted = [columns * ranks if shard == "w2" else columns]
        if list(loaded.shape) != wanted:
            raise ValueError(wrong_shape(loaded.shape, wanted))
        first = rank * columns if shard == "w2" else 0
        data[expert, 1 if shard == "w3" else 0].copy_(loaded.narrow(0, first, columns))

    for name, parts, _, columns in shape.matrices:
        index = torch.zeros((shape.experts, parts, columns), dtype=torch.int32)
        add_parameter(layer, f"{name}_{suffix}", index, attributes, place=place, optional=optional)


def tensors(
    bits: int,
    group_size: int | None,
    codes: OfBoth,
    scales: OfBoth,
    zeros: OfBoth,
    group_index: OfBoth,
) -> dict[str, Any]:
    """What `ExpertFormat.tensors` returns for integer experts.

    Args:
        bits: 4 or 8.
        group_size: columns in a group; None: all of a row.
        codes: uint8 [E, rows, K/2] or int8 [E, rows, K].
        scales: float32 [E, rows, groups].
        zeros: zero points of the same shape, less 128 if of 8 bits. Empty: they are in the middle.
        group_index: int32 [E, parts, K], the group of each column. Empty: groups lie in order.

    Raises:
        ValueError: if a column is in a group that does not exist.
    """
    found: dict[str, Any] = {"format": f"int{bits}", **codes}
    if group_index:
        assert group_size is not None
        here = {
            name: _groups_in_order(name, index, group_size, scales[name].shape[2])
            for name, index in group_index.items()
        }
        if None in here.values():
            found |= {f"{name}_order": index for name, index in group_index.items()}
        else:
            scales, zeros = (
                {name: data[..., here[name]].contiguous() for name, data in of.items()}
                for of in (scales, zeros)
            )
    found["group_size"] = group_size
    in_order = "w13_order" not in found
    if group_size is None:
        if bits == 8 and not zeros:
            scales = {name: scale.squeeze(-1) for name, scale in scales.items()}
    elif in_order and computable(bits, group_size, symmetric=not zeros):
        # lk gets the largest of its group sizes that divides the checkpoint's. A scale of the
        # checkpoint then stands several times.
        group = max(group for group in weight_formats.GROUP_SIZES if group_size % group == 0)
        found["group_size"] = group
        times = group_size // group
        scales, zeros = (
            {name: data.repeat_interleave(times, dim=2) for name, data in of.items()}
            for of in (scales, zeros)
        )
    # lk wants a scale for each row of int8 in float32, and takes group scales in 16 bits as well.
    as_given = bits == 8 and group_size is None
    found |= {
        f"{name}_scale": scale if as_given else narrow(scale) for name, scale in scales.items()
    }
    return found | {f"{name}_zero": zero for name, zero in zeros.items()}


def _groups_in_order(name: str, index: torch.Tensor, size: int, groups: int) -> slice | None:
    """The groups of these columns, if they follow one another in every expert; else None."""
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= groups:
        raise ValueError(f"{name}: columns are in groups {low} to {high}, of 0 to {groups - 1}")
    columns = torch.arange(index.shape[2], dtype=index.dtype) // size
    if index.shape[2] % size or not torch.equal(index, (columns + low).expand_as(index)):
        return None
    return slice(low, high + 1)

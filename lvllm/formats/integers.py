"""What checkpoints of packed integers have in common: groups along K, of any size, in any order.

Act-order: a checkpoint says for each column in which group it is. Any column may then need any
scale, so a process that holds some of w2's columns needs the scales of all.
"""

from typing import Any

import torch

from lvllm.engine import weight_formats
from lvllm.formats.base import Shape, add_parameter, narrow

__all__ = ["add_order", "computable", "groups_of", "tensors", "whole"]

OfBoth = dict[str, torch.Tensor]
"""Of "w13" and "w2"."""


def computable(bits: int, size: int | None, *, symmetric: bool) -> bool:
    """Whether the engine computes groups of `size` columns (None: a row) as they are."""
    if bits == 8:
        return size is None and symmetric
    return size is None or any(size % group == 0 for group in weight_formats.GROUP_SIZES)


def groups_of(layer: Any, name: str, columns: int, size: int | None, ordered: bool) -> int:
    """How many groups of a row this process needs of w13 or w2, of which it has `columns`."""
    if ordered and name == "w2":
        columns *= layer.moe_config.moe_parallel_config.tp_size
    return columns // size if size else 1


def whole(name: str, ordered: bool) -> dict[str, Any]:
    """The attribute of a parameter with scales or zero points of all groups, if it has them."""
    if ordered and name == "w2":
        return {"place": lambda data, loaded, shard: data.copy_(loaded)}
    return {}


def add_order(
    layer: Any, shape: Shape, suffix: str, attributes: dict[str, Any], *, optional: bool = False
) -> None:
    """Register w13_SUFFIX and w2_SUFFIX, int32 [E, parts, columns]: the group of each column."""
    rank = layer.moe_config.tp_rank

    def place(data: torch.Tensor, loaded: torch.Tensor, shard: str) -> None:
        columns = data.shape[1]
        first = rank * columns if shard == "w2" else 0
        data[1 if shard == "w3" else 0].copy_(loaded.narrow(0, first, columns))

    for name, parts, _, columns in shape.matrices:
        index = torch.zeros((shape.experts, parts, columns), dtype=torch.int32)
        add_parameter(layer, f"{name}_{suffix}", index, attributes, place=place, optional=optional)


def tensors(
    bits: int, size: int | None, codes: OfBoth, scales: OfBoth, zeros: OfBoth, order: OfBoth
) -> dict[str, Any]:
    """What `ExpertFormat.tensors` returns of integer experts.

    Args:
        bits: 4 or 8.
        size: columns in a group; None: all of a row.
        codes: uint8 [E, rows, K/2] or int8 [E, rows, K].
        scales: float32 [E, rows, groups].
        zeros: of the same shape, less 128 if of 8 bits. Empty: the middle.
        order: int32 [E, parts, K], the group of each column. Empty: one after another.

    Raises:
        ValueError: for a column in a group that is not there.
    """
    found: dict[str, Any] = {"format": f"int{bits}", **codes}
    if order:
        assert size is not None
        here = {name: _in_order(name, order[name], size, scales[name].shape[2]) for name in order}
        if None in here.values():
            found |= {f"{name}_order": index for name, index in order.items()}
        else:
            scales, zeros = (
                {name: data[..., here[name]].contiguous() for name, data in of.items()}
                for of in (scales, zeros)
            )
    if bits == 4:
        found["group_size"] = size
        if size is not None and "w13_order" not in found and computable(4, size, symmetric=True):
            # A scale may stand several times: the engine's groups are the largest that divide.
            group = max(group for group in weight_formats.GROUP_SIZES if size % group == 0)
            found["group_size"] = group
            scales, zeros = (
                {name: data.repeat_interleave(size // group, dim=2) for name, data in of.items()}
                for of in (scales, zeros)
            )
    elif size is None and not zeros:
        scales = {name: scale.squeeze(-1) for name, scale in scales.items()}
    found |= {
        f"{name}_scale": narrow(scale) if bits == 4 else scale for name, scale in scales.items()
    }
    return found | {f"{name}_zero": zero for name, zero in zeros.items()}


def _in_order(name: str, order: torch.Tensor, size: int, groups: int) -> slice | None:
    """The groups of these columns, if they follow one another in every expert; else None."""
    low, high = int(order.min()), int(order.max())
    if low < 0 or high >= groups:
        raise ValueError(f"{name}: columns are in groups {low} to {high}, of 0 to {groups - 1}")
    columns = torch.arange(order.shape[2], dtype=order.dtype) // size
    if order.shape[2] % size or not torch.equal(order, (columns + low).expand_as(order)):
        return None
    return slice(low, high + 1)

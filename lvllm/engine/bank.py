"""Memory for expert weights: huge pages, with each row on the NUMA node that computes it.

There is one copy of the weights: the loader writes into these tensors, the engine computes on them,
and weights are streamed to a GPU from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lvllm.engine.ops import raw_ops

__all__ = [
    "allocate",
    "allocated_bytes",
    "available_bytes",
    "map_shared",
    "page_nodes",
    "shared_place",
]


def allocate(shape: Sequence[int], dtype: torch.dtype, *, parts: int = 1) -> torch.Tensor:
    """A zeroed CPU tensor of shape [E, rows, ...] in the engine's memory.

    Pages come when they are written. On a machine with several NUMA nodes each node's share of an
    expert's rows is written at once instead, so that it lies on that node, unless
    `engine.configure` has been told to interleave. The memory goes back to the machine when the
    tensor's storage is freed; shared memory, when no other process maps it either.

    Args:
        shape: E experts, rows an expert, then any further dimensions.
        dtype: any fixed-size dtype.
        parts: how many blocks of rows are divided among the nodes, each by itself: 2 for w13, since
            a gate row and its up row are needed together, 1 for w2.

    Raises:
        ValueError: if the rows cannot be cut into that many parts.
        MemoryError: with the size asked for, what is free, and the settings that need less.
    """
    if len(shape) < 2 or any(size < 1 for size in shape):
        raise ValueError(f"shape is {tuple(shape)}, wanted [experts, rows, ...] of positive sizes")
    experts, rows = shape[0], shape[1]
    if parts < 1 or rows % parts != 0:
        raise ValueError(f"parts is {parts}, must divide the {rows} rows of an expert")
    row_bytes = math.prod(shape[2:]) * dtype.itemsize
    try:
        memory = raw_ops.allocate(experts, parts, rows // parts, row_bytes)
    except RuntimeError as error:
        raise MemoryError(
            f"{error}; LVLLM_MOE_USE_WEIGHT=INT4 or a smaller kv-cache-memory-bytes needs less"
        ) from None
    return memory.view(dtype).view(tuple(shape))


def allocated_bytes() -> int:
    """Bytes of this memory in use, in whole huge pages, without what `map_shared` gave."""
    size: int = raw_ops.allocated_bytes()
    return size


def shared_place(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Where a tensor begins in shared memory: (file descriptor, offset, bytes of the whole memory).

    The descriptor is open as long as the memory is allocated. Raises ValueError for memory that is
    not shared.
    """
    descriptor, offset, size = raw_ops.shared_place(tensor.data_ptr())
    return descriptor, offset, size


def map_shared(descriptor: int, size: int) -> torch.Tensor:
    """Map the memory that another process's `shared_place` gave, as uint8 [size].

    Writing to it ends the process.

    Raises RuntimeError if the memory is smaller.
    """
    memory: torch.Tensor = raw_ops.map_shared(descriptor, size)
    return memory


def available_bytes() -> int:
    """Bytes that the machine, or the memory cgroup of this process, can still give."""
    size: int = raw_ops.available_bytes()
    return size


def page_nodes(tensor: torch.Tensor, *, step: int = 4096) -> list[int]:
    """The NUMA node of every step-th byte of a tensor's memory, -1 where no page is yet."""
    start = tensor.data_ptr()
    addresses = list(range(start, start + tensor.numel() * tensor.element_size(), step))
    nodes: list[int] = raw_ops.page_nodes(addresses)
    return nodes

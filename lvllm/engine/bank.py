"""Memory for expert weights: huge pages, with each row on the NUMA node that computes it.

There is one copy of the weights. The loader writes into these tensors, the engine computes on them,
and the weights are streamed to a GPU from them.
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

MOST_BLOCKS = 1 << 17
"""Experts times parts, as in csrc/lk/memory.h. No model comes near, and placing each takes time."""
MOST_BYTES = 1 << 47
"""What a process can address."""


def allocate(shape: Sequence[int], dtype: torch.dtype, *, parts: int = 1) -> torch.Tensor:
    """A zeroed CPU tensor of shape [E, rows, ...] in the engine's memory.

    On a machine with one NUMA node, a page takes memory only once it is written. With several nodes
    all rows are written here, so that each node's share of an expert's rows lies on that node,
    unless `engine.configure` has been told to interleave. The memory goes back to the machine when
    the tensor's storage is freed. Shared memory stays as long as another process maps it.

    Args:
        shape: the number of experts, the rows of each expert, then any further dimensions.
        dtype: any fixed-size dtype.
        parts: the number of matrices that follow each other in the rows: 2 for w13, 1 for w2. Each
            matrix is divided among the nodes by itself, so a gate row and its up row, which are
            needed together, lie on the same node.

    Raises:
        ValueError: if the rows cannot be cut into that many parts, or the numbers are absurd: more
            than MOST_BLOCKS experts times parts, or more than MOST_BYTES.
        MemoryError: if there is too little memory. The text names the size asked for, the free
            size, and the settings that need less.
    """
    if len(shape) < 2 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"shape is {tuple(shape)}, wanted [experts, rows, ...] of positive sizes")
    experts, rows = shape[0], shape[1]
    if parts < 1 or rows % parts != 0:
        raise ValueError(f"parts is {parts}, must divide the {rows} rows of an expert")
    if experts * parts > MOST_BLOCKS:
        raise ValueError(
            f"shape is {tuple(shape)} in {parts} parts, allowed are {MOST_BLOCKS} experts times"
            " parts"
        )
    if math.prod(shape) * dtype.itemsize > MOST_BYTES:
        raise ValueError(f"shape is {tuple(shape)} of {dtype}, allowed are {MOST_BYTES} bytes")
    row_bytes = math.prod(shape[2:]) * dtype.itemsize
    try:
        memory = raw_ops.allocate(experts, parts, rows // parts, row_bytes)
    except RuntimeError as error:
        raise MemoryError(
            f"{error}; LVLLM_MOE_USE_WEIGHT=INT4 or a smaller kv-cache-memory-bytes needs less"
        ) from None
    return memory.view(dtype).view(tuple(shape))


def allocated_bytes() -> int:
    """Bytes of the engine's memory in use, in whole huge pages, without memory of `map_shared`."""
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

    The memory is read-only: writing to it ends the process. Raises RuntimeError if the memory is
    smaller than `size`.
    """
    memory: torch.Tensor = raw_ops.map_shared(descriptor, size)
    return memory


def available_bytes() -> int:
    """Bytes that are free on the machine, or in this process's memory cgroup if that is less."""
    size: int = raw_ops.available_bytes()
    return size


def page_nodes(tensor: torch.Tensor, *, step: int = 4096) -> list[int]:
    """The NUMA node of every step-th byte of a tensor; -1 where no page has been written yet."""
    start = tensor.data_ptr()
    addresses = list(range(start, start + tensor.numel() * tensor.element_size(), step))
    nodes: list[int] = raw_ops.page_nodes(addresses)
    return nodes

"""What the engine counts of a layer's calls, as `LayerCounters` in csrc/lk/counters.h lays it out.

The counts are int64 in memory that the caller gives. They only grow, and another process may read
them at any time.
"""

from enum import IntEnum

import torch

from lvllm.engine.ops import raw_ops

__all__ = [
    "PASSES",
    "READS",
    "SIZES",
    "TOKENS_OF_EXPERTS",
    "WAITED",
    "Reason",
    "calls",
    "count",
    "nanoseconds",
    "size",
    "tokens",
]


class Reason(IntEnum):
    """Why the engine computes a batch."""

    NO_GPU = 0
    """There is no other place."""
    SMALL = 1
    """It has fewer tokens than are worth a copy of the weights to the GPU."""
    OFF = 2
    """No batch of this layer is streamed."""
    GRAPH = 3
    """It comes from a graph of the GPU."""
    SHARED = 4
    """The GPU computes the batch's other experts at the same time."""


SIZES = (*(1 << bit for bit in range(11)), None)
"""Passes over a layer are sorted by the number of their experts: up to each of these, in order."""

WAITED = 3 * len(Reason)
"""Place of the nanoseconds that calls waited for other calls of this process to end."""
READS = WAITED + 1
"""Place of the number of experts whose weights were read, summed over all passes. A batch with more
than 256 MiB of scratch memory takes several passes."""
PASSES = READS + 1
"""Place of the first of the numbers of passes, which are sorted by `SIZES`."""
TOKENS_OF_EXPERTS = PASSES + len(SIZES)
"""Place of the tokens of expert 0; those of the others follow."""


def calls(reason: Reason) -> int:
    """Place of the number of calls."""
    return 3 * reason


def tokens(reason: Reason) -> int:
    """Place of the number of tokens of these calls."""
    return 3 * reason + 1


def nanoseconds(reason: Reason) -> int:
    """Place of the nanoseconds that the engine computed in these calls."""
    return 3 * reason + 2


def size(experts: int) -> int:
    """How many numbers a layer of so many experts needs."""
    return TOKENS_OF_EXPERTS + experts


def count(handle: torch.Tensor, counters: torch.Tensor | None) -> None:
    """From now on, count the calls of the layer with this handle; None ends it.

    Args:
        handle: `ExpertLayer.handle`.
        counters: int64 [size(experts)], contiguous, on the CPU, also in shared memory. The engine
            keeps it alive until the layer's end.

    Raises:
        ValueError: for another dtype or size, or a handle that names no layer.
    """
    raw_ops.count(int(handle), counters)

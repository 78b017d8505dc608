"""What is counted of the streamed batches of a layer, in numbers that another process may read."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvllm.engine.counters import SIZES

__all__ = [
    "BYTES",
    "CALLS",
    "COMPUTING",
    "COPYING",
    "HITS",
    "MISSES",
    "PASSES",
    "READS",
    "STALLS",
    "TOKENS",
    "TOKENS_OF_EXPERTS",
    "WAITING",
    "StreamedCounters",
    "size",
]

# The places of the numbers. Times are in nanoseconds.
CALLS, TOKENS, COMPUTING, COPYING, WAITING, BYTES, HITS, STALLS, MISSES, READS, PASSES = range(11)
# PASSES is the first of the numbers of batches, which are sorted by `SIZES`, and the tokens of the
# experts follow them.
TOKENS_OF_EXPERTS = PASSES + len(SIZES)


def size(experts: int) -> int:
    """How many numbers a layer of so many experts needs."""
    return TOKENS_OF_EXPERTS + experts


class StreamedCounters:
    """Adds to the int64 `numbers` [size(experts)] of a layer, which this process alone writes."""

    def __init__(self, numbers: NDArray[np.int64]) -> None:
        self._numbers: Any = numbers

    def add_batch(self, tokens: int, of_experts: list[int]) -> None:
        """Count a batch of so many tokens, and the tokens that each expert gets."""
        numbers, routed = self._numbers, np.array(of_experts, np.int64)
        active = int(np.count_nonzero(routed))
        numbers[CALLS] += 1
        numbers[TOKENS] += tokens
        numbers[READS] += active
        numbers[PASSES + min(max(active - 1, 0).bit_length(), len(SIZES) - 1)] += 1
        numbers[TOKENS_OF_EXPERTS:] += routed

    def add_times(
        self, copied_bytes: int, copying: float, waited: float, computing: float, ahead: bool
    ) -> None:
        """Count the copy of a group of experts, when its times are known.

        The times are in seconds. `ahead` says whether the copy had been queued before the layer was
        asked for.
        """
        numbers = self._numbers
        numbers[BYTES] += copied_bytes
        for place, seconds in ((COPYING, copying), (WAITING, waited), (COMPUTING, computing)):
            numbers[place] += round(1e9 * max(seconds, 0.0))
        numbers[MISSES if not ahead else STALLS if waited > 0 else HITS] += 1

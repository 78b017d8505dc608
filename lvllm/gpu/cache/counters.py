"""What a cache counts, in numbers that another process may read."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["HITS", "MISSES", "MOVED", "SIZE", "CacheCounters"]

HITS, MISSES, MOVED = range(3)
SIZE = 3


class CacheCounters:
    """Adds to the int64 `numbers` [SIZE] of a cache, which this process alone writes."""

    def __init__(self, numbers: NDArray[np.int64]) -> None:
        self._numbers: Any = numbers

    def add(self, hits: int, misses: int, moved: int) -> None:
        """Count reads of experts with and without slots. `moved` is the bytes of all copies."""
        self._numbers[HITS] += hits
        self._numbers[MISSES] += misses
        self._numbers[MOVED] = moved

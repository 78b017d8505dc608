"""Spans of a ring of memory, which are taken in an order and given back in the same order."""

from collections import deque
from dataclasses import dataclass

from lvllm.gpu.accelerator import Event

__all__ = ["Freed", "Spans"]


@dataclass(frozen=True)
class Freed:
    """A span that was given back."""

    begin: int
    end: int
    released: Event
    """Reached when nobody reads the span any more."""
    what: str
    """What was computed from it, for messages."""


class Spans:
    """Divides memory of `size` bytes into spans. A span does not go over the end of the memory."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._taken: deque[tuple[int, int]] = deque()
        self._freed: list[Freed] = []

    def take(self, size: int) -> tuple[int, Freed | None] | None:
        """Take a span of so many bytes.

        Returns its begin, and the last of the spans before it in this place, which must have been
        released before the new one is written; or None if there is no room yet.
        """
        begin = self._room(size)
        if begin is None:
            return None
        end = begin + size
        self._taken.append((begin, end))
        before = [freed for freed in self._freed if freed.begin < end and begin < freed.end]
        # Whoever waits for the last one has waited for all that were given back earlier.
        self._freed = [freed for freed in self._freed if not begin <= freed.begin < end]
        return begin, before[-1] if before else None

    def give_back(self, released: Event | None, what: str = "") -> None:
        """Give the oldest span back. Without an event, nobody has read it."""
        begin, end = self._taken.popleft()
        if released is not None:
            self._freed.append(Freed(begin, end, released, what))

    def _room(self, size: int) -> int | None:
        if not self._taken:
            return 0 if size <= self.size else None
        first, last = self._taken[0][0], self._taken[-1][1]
        if last <= first:  # The free bytes are those between the newest and the oldest span.
            return last if last + size <= first else None
        if last + size <= self.size:
            return last
        return 0 if size <= first else None

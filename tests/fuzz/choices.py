"""Turns the bytes of an input into choices, so that a fuzzing engine can steer them."""

from collections.abc import Sequence
from typing import TypeVar

__all__ = ["Choices"]

Value = TypeVar("Value")


class Choices:
    """Draws values from bytes. After the last byte every draw is the first one possible."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def below(self, end: int) -> int:
        """A number from 0 to end - 1, from as many bytes as `end` needs."""
        size = max(1, ((end - 1).bit_length() + 7) // 8)
        return int.from_bytes(self.take(size), "little") % end

    def between(self, first: int, last: int) -> int:
        return first + self.below(last - first + 1)

    def of(self, values: Sequence[Value]) -> Value:
        return values[self.below(len(values))]

    def flag(self) -> bool:
        return self.below(2) == 1

    def take(self, count: int) -> bytes:
        """The next `count` bytes, or fewer at the end."""
        taken = self._data[self._at : self._at + count]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        return self.take(len(self._data))

    @property
    def over(self) -> bool:
        return self._at == len(self._data)

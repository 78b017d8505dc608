"""Sizes, counts and lists of numbers as people read them, and whole-number arithmetic."""

from collections.abc import Sequence

__all__ = ["GIB", "MIB", "amount", "ceil_div", "gib", "ranges"]

MIB = 1 << 20
GIB = 1 << 30


def gib(size: float) -> str:
    """A number of bytes in GiB, such as `1.50 GiB`."""
    return f"{size / GIB:.2f} GiB"


def amount(size: float) -> str:
    """A number of bytes in GiB, or in MiB if it is less than one GiB, such as `12 MiB`."""
    return gib(size) if size >= GIB or size == 0 else f"{size / MIB:.0f} MiB"


def ceil_div(count: int, size: int) -> int:
    """How many pieces of `size` hold `count` things; the last piece may be partly empty."""
    return -(-count // size)


def ranges(numbers: Sequence[int]) -> str:
    """Write rising numbers as the kernel lists CPUs: [1, 2, 3, 7] becomes `1-3,7`.

    LVLLM_GPU_RESIDENT_MOE_LAYERS is written in this way, too.
    """
    parts: list[str] = []
    start = 0
    for end, number in enumerate(numbers):
        if end + 1 == len(numbers) or numbers[end + 1] != number + 1:
            first = numbers[start]
            parts.append(f"{first}" if first == number else f"{first}-{number}")
            start = end + 1
    return ",".join(parts)

"""Sizes and counts as people read them, and whole-number arithmetic."""

__all__ = ["GIB", "MIB", "ceil_div", "gib"]

MIB = 1 << 20
GIB = 1 << 30


def gib(size: float) -> str:
    """A number of bytes in GiB, such as `1.50 GiB`."""
    return f"{size / GIB:.2f} GiB"


def ceil_div(count: int, size: int) -> int:
    """How many pieces of `size` hold `count` things; the last piece may be partly empty."""
    return -(-count // size)

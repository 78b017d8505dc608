"""Finds what a program of a grouped product computes: one expert, and a block of its rows."""

import triton
import triton.language as tl

__all__ = ["find"]


@triton.jit
def find(  # type: ignore[no-untyped-def]
    starts,  # int64 [count + 1]: the first pair of each expert, and the end of the last one's
    table,  # int32 [count]: where each expert's weights are; -1: it is not computed here
    count,
    first,  # of the pairs that are computed
    last,
    number,  # of the block
    CACHED: tl.constexpr,  # whether `table` is read; else weights lie in the order of experts
    EXPERTS: tl.constexpr,  # a power of two, at least count
    ROWS: tl.constexpr,  # of a block
):
    """Return where the weights of the block's expert are, its first pair, and the end of its pairs.

    All experts' blocks are numbered in the order of the experts. The numbers of pairs are looked up
    on the device: to copy a table of blocks there would take a wait. A block beyond the last one
    has no pairs.
    """
    expert = tl.arange(0, EXPERTS)
    begins = tl.load(starts + expert, mask=expert < count, other=0)
    ends = tl.load(starts + expert + 1, mask=expert < count, other=0)
    begins = tl.minimum(tl.maximum(begins, first), last)
    ends = tl.minimum(tl.maximum(ends, first), last)
    place = expert
    if CACHED:
        place = tl.load(table + expert, mask=expert < count, other=-1)
        ends = tl.where(place >= 0, ends, begins)
    blocks = (ends - begins + ROWS - 1) // ROWS
    up_to = tl.cumsum(blocks, 0)
    found = tl.sum((up_to <= number).to(tl.int32), 0)
    own = expert == found
    begin = tl.sum(tl.where(own, begins, 0), 0)
    before = tl.sum(tl.where(own, up_to - blocks, 0), 0)
    weights = tl.sum(tl.where(own, place, 0), 0)
    return weights, begin + (number - before) * ROWS, tl.sum(tl.where(own, ends, 0), 0)

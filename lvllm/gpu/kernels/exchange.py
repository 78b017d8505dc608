"""Copies small tensors between the device and pinned memory in one kernel.

Decoding exchanges some KiB with the host in each layer. A copy engine takes some microseconds to
begin each copy, and a copy to the device would queue there behind the weights of a streamed layer.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lvllm.units import ceil_div

__all__ = ["MOST", "run"]

MOST = 3
"""How many tensors a launch copies."""
ELEMENTS = 2048
"""What a program copies: 16 bytes at a time in each thread of four warps, for 16-bit elements."""


@triton.jit
def _block(target, source, size, number, ELEMENTS: tl.constexpr):  # type: ignore[no-untyped-def]
    at = number.to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    tl.store(target + at, tl.load(source + at, mask=at < size), mask=at < size)


@triton.jit
def _exchange(  # type: ignore[no-untyped-def]
    target_a,
    source_a,
    size_a,
    target_b,
    source_b,
    size_b,
    target_c,
    source_c,
    size_c,
    ELEMENTS: tl.constexpr,
):
    """Copy a block of one of the tensors. The grid has their blocks, one tensor after the other."""
    number = tl.program_id(0)
    blocks_a = tl.cdiv(size_a, ELEMENTS)
    blocks_b = tl.cdiv(size_b, ELEMENTS)
    if number < blocks_a:
        _block(target_a, source_a, size_a, number, ELEMENTS)
    elif number < blocks_a + blocks_b:
        _block(target_b, source_b, size_b, number - blocks_a, ELEMENTS)
    else:
        _block(target_c, source_c, size_c, number - blocks_a - blocks_b, ELEMENTS)


def run(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy each pair's second tensor to its first, in the current stream.

    The tensors of a pair are contiguous, of one shape and dtype, and on the device or pinned. There
    are up to MOST pairs.
    """
    blocks = sum(ceil_div(source.numel(), ELEMENTS) for _, source in pairs)
    if not blocks:
        return
    arguments: list[torch.Tensor | int] = []
    for target, source in pairs:
        arguments += [target, source, source.numel()]
    while len(arguments) < 3 * MOST:
        arguments += [*pairs[0], 0]
    _exchange[(blocks,)](*arguments, ELEMENTS=ELEMENTS)

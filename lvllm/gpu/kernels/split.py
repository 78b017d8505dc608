"""Divides a batch between the experts in a cache and all others, in one kernel."""

import torch
import triton
import triton.language as tl

from lvllm.units import ceil_div

__all__ = ["run"]

SLOTS = 1024
"""How many ids a program looks up."""


@triton.jit
def _split(ids, table, out, size, experts, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    expert = tl.load(ids + at, mask=at < size, other=-1)
    known = (expert >= 0) & (expert < experts)
    slot = tl.load(table + expert, mask=known, other=-1)
    tl.store(out + at, tl.where(slot >= 0, -1, expert).to(tl.int32), mask=at < size)


def run(topk_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return topk_ids [M, k] as int32, with -1 in the place of experts that have slots.

    `table` is int32 [experts]: the slot of each expert, or -1.
    """
    ids = topk_ids.contiguous()
    out = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    if ids.numel():
        _split[(ceil_div(ids.numel(), SLOTS),)](
            ids, table, out, ids.numel(), len(table), SLOTS=SLOTS
        )
    return out

"""Which share of the experts' reads a cache on the GPU saves, with two skews of routing.

Routing is made up by benchmarks/expert_cache, and the cache chooses by lvllm/gpu/cache. The skews
are fitted to what was reported for Qwen3-30B-A3B, and assumed for all other models.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch

from benchmarks.expert_cache.routing import fitted_skew, made_up
from benchmarks.expert_cache.schemes import SCHEMES

__all__ = ["SKEWS", "saved"]

SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
LAYERS, EXPERTS, TOPK, STEPS = 12, 128, 8, 3000
COVERED = 65
"""Of 128 experts, so many take 90% of the choices of about 1000 tokens of prose, code and math
(https://mcp-tool-shop-org.github.io/gpu-container/handbook/derisk/)."""
PROMPT, CHOSEN = 512, 95
"""So many tokens of a prompt choose so many experts (benchmarks/expert_cache)."""


def covering(trace: Sequence[torch.Tensor], share: float) -> float:
    """Return how many experts of a layer take this share of all choices."""
    counts = torch.stack(list(trace)).sum(0).float().sort(dim=1, descending=True).values
    sums = counts.cumsum(1) / counts.sum(1, keepdim=True)
    return float((sums < share).sum(1).float().mean()) + 1


@cache
def even_skew() -> float:
    """Return the skew with which COVERED experts take 90% of the choices."""
    low, high = 0.0, 8.0
    while high - low > 0.02:
        middle = (low + high) / 2
        trace = list(made_up(LAYERS, EXPERTS, TOPK, middle, 1, 1000, 1))
        low, high = (middle, high) if covering(trace, 0.9) > COVERED else (low, middle)
    return low


SKEWS = {
    "even": even_skew,
    "skewed": cache(lambda: fitted_skew(EXPERTS, TOPK, PROMPT, CHOSEN)),
}


@cache
def _curve(skew: str, users: int) -> list[tuple[float, float]]:
    """Return the shares of the experts in the cache, each with the share of reads that it saves."""
    trace = list(made_up(LAYERS, EXPERTS, TOPK, SKEWS[skew](), users, STEPS, 1))
    counted = SCHEMES["counted"]
    points = [(share, counted(trace, int(share * LAYERS * EXPERTS))) for share in SHARES]
    return [(0.0, 0.0), *points, (1.0, 1.0)]


def saved(skew: str, users: int, share: float) -> float:
    """Return the share of reads that a cache of this share of the experts saves."""
    curve = _curve(skew, users)
    for (left, low), (right, high) in pairwise(curve):
        if share <= right:
            return low + (high - low) * (share - left) / (right - left)
    return 1.0

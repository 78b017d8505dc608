"""Simulates which share of the experts' reads a cache saves, with two skews of routing.

    python -m benchmarks.expert_cache.curves

prints the curves of lvllm/planning/hits.py. Routing is made up, and the cache chooses by
lvllm/gpu/cache. The skews are fitted to what was reported for Qwen3-30B-A3B.
"""

from collections.abc import Sequence
from functools import cache

import torch

from benchmarks.expert_cache.routing import fitted_skew, made_up
from benchmarks.expert_cache.schemes import SCHEMES
from lvllm.planning.hits import CHOSEN, EVEN, EXPERTS, SHARES

__all__ = ["COVERED", "SKEWS", "covering", "even_skew", "simulated"]

LAYERS, STEPS = 12, 3000
COVERED = 65
"""Of 128 experts, so many take 90% of the choices (see EVEN)."""
PROMPT, OF_PROMPT = 512, 95
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
        trace = list(made_up(LAYERS, EXPERTS, CHOSEN, middle, 1, 1000, 1))
        low, high = (middle, high) if covering(trace, 0.9) > COVERED else (low, middle)
    return low


SKEWS = {
    "even": even_skew,
    "skewed": cache(lambda: fitted_skew(EXPERTS, CHOSEN, PROMPT, OF_PROMPT)),
}


def simulated(skew: str, users: int) -> tuple[float, ...]:
    """Return the share of reads that a cache of each of SHARES saves."""
    trace = list(made_up(LAYERS, EXPERTS, CHOSEN, SKEWS[skew](), users, STEPS, 1))
    counted = SCHEMES["counted"]
    return tuple(counted(trace, int(share * LAYERS * EXPERTS)) for share in SHARES)


if __name__ == "__main__":
    for skew in SKEWS:
        print(f"{skew.upper()}: Curves = {{")
        for users in EVEN:
            print(f"    {users}: ({', '.join(f'{hits:.3f}' for hits in simulated(skew, users))}),")
        print("}")

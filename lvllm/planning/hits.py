"""Which share of the reads of experts a cache on the cards saves.

No server with a cache has been measured. The numbers are those of a simulation: routing is made up
(benchmarks/expert_cache), the cache chooses as it does on a GPU, and the skew of the routing is
fitted to what was reported for one model, Qwen3-30B-A3B. `python -m benchmarks.expert_cache.curves`
prints them. That other models are as skewed is assumed, so a plan takes the more even of two
reports, and no skew at all where a layer has few experts or a batch many tokens.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

from lvllm.planning.shape import LayerShape, ModelShape

__all__ = [
    "CHOSEN",
    "EVEN",
    "EXPERTS",
    "FEWEST",
    "SHARES",
    "SKEWED",
    "Curves",
    "is_known",
    "saved",
    "saved_reads",
]

SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Of all experts, those that have slots."""
Curves = Mapping[int, tuple[float, ...]]
"""By the number of users, the share of reads that each of SHARES saves."""
EVEN: Curves = {
    1: (0.311, 0.463, 0.614, 0.767, 0.902),
    2: (0.188, 0.303, 0.453, 0.637, 0.832),
    4: (0.133, 0.234, 0.380, 0.575, 0.794),
    8: (0.093, 0.176, 0.314, 0.508, 0.748),
    16: (0.061, 0.122, 0.237, 0.425, 0.694),
    32: (0.045, 0.090, 0.180, 0.350, 0.632),
    64: (0.036, 0.072, 0.145, 0.290, 0.565),
}
"""Of 128 experts, 65 take 90% of the choices of about 1000 tokens of prose, code and math
(https://mcp-tool-shop-org.github.io/gpu-container/handbook/derisk/)."""
SKEWED: Curves = {
    1: (0.425, 0.650, 0.804, 0.908, 0.973),
    2: (0.228, 0.367, 0.557, 0.770, 0.928),
    4: (0.161, 0.283, 0.462, 0.684, 0.887),
    8: (0.106, 0.205, 0.370, 0.594, 0.838),
    16: (0.070, 0.141, 0.275, 0.491, 0.784),
    32: (0.052, 0.105, 0.211, 0.410, 0.720),
    64: (0.041, 0.083, 0.167, 0.334, 0.643),
}
"""Of 128 experts, 512 tokens of a prompt choose 95."""
CHOSEN, EXPERTS = 8, 128
"""Each user of the simulation takes so many of a layer's experts in a step."""
FEWEST = 64
"""No report was found of layers with fewer experts, so these are taken to be chosen evenly."""


def saved(share: float, users: float, curves: Curves = EVEN) -> float:
    """The share of reads that a cache of this share of the experts saves.

    More users read more of the experts, and so a larger part of those without slots. Between two
    simulated numbers of users the larger one counts. With more users than were simulated, a cache
    is taken to save its share of the experts.
    """
    simulated = next((count for count in curves if count >= users), None)
    if simulated is None:
        return min(share, 1.0)
    points = [(0.0, 0.0), *zip(SHARES, curves[simulated], strict=True), (1.0, 1.0)]
    for (left, low), (right, high) in pairwise(points):
        if share <= right:
            return low + (high - low) * (share - left) / (right - left)
    return 1.0


def is_known(model: ModelShape) -> bool:
    """Whether the model has as many experts as those of which something is known."""
    return all(layer.experts >= FEWEST for layer in model.moe_layers)


def saved_reads(layer: LayerShape, tokens: int, share: float) -> float:
    """The share of a layer's reads that a cache of this share of all experts saves.

    Tokens of a prompt count as so many users, although they are more alike.
    """
    if layer.experts < FEWEST or layer.chosen >= layer.experts:
        return min(share, 1.0)
    # As many users of the simulation read the same share of a layer's experts.
    each = math.log(1 - layer.chosen / layer.experts) / math.log(1 - CHOSEN / EXPERTS)
    return saved(share, tokens * each)

"""Decoding: what a step takes, for some ways to place the experts."""

from collections import defaultdict
from dataclasses import dataclass

from benchmarks.gpu_model.layers import Parts
from lvllm.planning import cpu_time
from lvllm.planning.placement import resident_layers

__all__ = ["Step", "step"]


@dataclass(frozen=True)
class Step:
    """A step of all users, in seconds by what they are spent on."""

    users: int
    spent: dict[str, float]

    @property
    def rate(self) -> float:
        """Tokens a second of all users together."""
        return self.users / sum(self.spent.values())

    @property
    def bound(self) -> str:
        return max(self.spent, key=lambda name: self.spent[name])


def step(
    parts: Parts,
    users: int,
    context: int,
    *,
    resident: int = 0,
    saved: float = 0.0,
    deferred: float = 0.0,
) -> Step:
    """Compute one token for each user.

    Args:
        parts: the model and the machine.
        users: sequences.
        context: the tokens to which each of them looks back.
        resident: how many layers' experts are on the cards.
        saved: the share of lk's reads that a cache on the GPU saves.
        deferred: the share of lk's work that may end one layer later than the rest of its layer.
    """
    spent: dict[str, float] = defaultdict(float, vLLM=parts.overheads.step)
    kept = {layer.number for layer in resident_layers(parts.model, resident)}
    spent["GPU"] += parts.head(users)
    for layer in parts.model.layers:
        gpu = parts.dense(layer, users, users, context)
        if layer.number in kept:
            gpu += parts.products(layer, users)
        spent["GPU"] += gpu
        if not layer.experts or layer.number in kept:
            continue
        calls = parts.handed_over(users) + cpu_time.CALL
        lk = (1 - saved) * (parts.lk(layer, users) - cpu_time.CALL)
        # The cache's experts are computed at the same time.
        waited = max(lk, saved * parts.products(layer, users))
        # What is deferred runs beside the calls and the GPU's part of the next layer.
        waited -= min(deferred * lk, gpu + calls)
        spent["calls"] += calls
        spent[parts.lk_limit(layer, users)] += waited
    return Step(users, dict(spent))

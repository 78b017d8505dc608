"""Divides the experts of a batch between the CPU and the device, so that both end together.

The device takes as long for an expert as its copy takes, whatever the number of its tokens. The CPU
takes a time to read the expert, and a time for each token. So the device gets the experts that have
the most tokens. FreeToken divides batches in this way, too; here the experts' own tokens decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

__all__ = ["Rates", "divide", "fit"]


@dataclass(frozen=True)
class Rates:
    """What the experts of a layer cost, in seconds."""

    copy: float
    """The copy of an expert to the device."""
    call: float
    """A call of lk, whatever the batch."""
    read: float
    """An expert that has tokens, on the CPU."""
    token: float
    """A token of an expert, on the CPU."""

    def describe(self) -> str:
        """Return the rates in words, for the log."""
        return (
            f"to whom an expert costs {1e6 * self.read:.1f} us and each of its tokens"
            f" {1e6 * self.token:.2f} us, and {1e6 * self.copy:.1f} us to the bus"
        )


def divide(counts: Sequence[int], rates: Rates) -> tuple[list[bool], float]:
    """Choose the experts that the device computes.

    Args:
        counts: the number of tokens of each expert.
        rates: what experts cost.

    Returns:
        Whether each expert is the device's, and the seconds until both have ended. Experts without
        tokens are nobody's.
    """
    order = sorted((e for e, count in enumerate(counts) if count), key=lambda e: -counts[e])
    cpu = sum(rates.read + rates.token * counts[expert] for expert in order)
    best, taken, device = cpu + rates.call if order else 0.0, 0, 0.0
    for number, expert in enumerate(order, start=1):
        device += rates.copy
        cpu -= rates.read + rates.token * counts[expert]
        both = max(device, cpu + rates.call if number < len(order) else 0.0)
        if both < best:
            best, taken = both, number
    chosen = [False] * len(counts)
    for expert in order[:taken]:
        chosen[expert] = True
    return chosen, best


def fit(copy: float, measured: Sequence[tuple[float, float]], experts: Sequence[float]) -> Rates:
    """Find the rates behind measured times of lk.

    Args:
        copy: the seconds of an expert's copy.
        measured: the choices of experts in a batch (tokens times top-k), and lk's seconds for it.
        experts: how many different experts the tokens of each of these batches have.

    Each batch counts alike, whatever its size: it is the relative error that is small.
    """
    rows = [(1.0, each, choices) for (choices, _), each in zip(measured, experts, strict=True)]
    wanted = np.array([seconds for _, seconds in measured])
    relative, ones = np.array(rows) / wanted[:, None], np.ones(len(rows))
    best, error = np.zeros(3), float(len(rows))
    # A rate is no less than 0. With three rates, those that are 0 can be tried one set at a time.
    for some in (list(few) for size in (1, 2, 3) for few in combinations(range(3), size)):
        found = np.zeros(3)
        found[some] = np.linalg.lstsq(relative[:, some], ones, rcond=None)[0]
        distance = float(np.sum((relative @ found - ones) ** 2))
        if (found >= 0).all() and distance < error:
            best, error = found, distance
    return Rates(copy, *map(float, best))

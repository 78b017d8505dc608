"""The search for faster settings, on machines whose speed is known."""

import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvllm.errors import LvllmError
from lvllm.tuning.search import BETTER, CONFIRMING, Knob, search

KNOBS = [Knob("A", ("1", "2")), Knob("B", ("1",)), Knob("C", ("1", "2", "3"))]
FACTORS = st.dictionaries(
    st.sampled_from([(knob.name, value) for knob in KNOBS for value in knob.values]),
    st.floats(0.3, 3),
)


class MadeUp:
    """A server whose rate is a product of factors of its settings, and a clock."""

    def __init__(
        self, factors: Mapping[tuple[str, str], float], seconds: float = math.inf, noise: float = 0
    ) -> None:
        self.factors = factors
        self.left = seconds
        self.noise = noise
        self.asked: list[tuple[dict[str, str], bool]] = []
        self.failing: tuple[str, str] | None = None

    def rate(self, changes: Mapping[str, str]) -> float:
        return 10 * math.prod(self.factors.get(item, 1.0) for item in changes.items())

    def run(self, changes: Mapping[str, str], confirming: bool) -> float:
        self.asked.append((dict(changes), confirming))
        self.left -= 10
        if self.failing is not None and self.failing in changes.items():
            raise LvllmError("it does not start")
        return self.rate(changes) * random.uniform(1 - self.noise, 1 + self.noise)

    def seconds(self) -> float:
        return self.left


@given(FACTORS)
def test_the_best_of_independent_settings_is_found(factors: dict[tuple[str, str], float]) -> None:
    server = MadeUp(factors)
    found = search(KNOBS, server.run, server.seconds)
    best = math.prod(
        max(1.0, *(factors.get((knob.name, value), 1.0) for value in knob.values)) for knob in KNOBS
    )
    # Each knob may leave a value that is better by less than noise.
    assert server.rate(found.best) >= 10 * best / BETTER ** (2 * len(KNOBS))
    assert found.gain == pytest.approx(server.rate(found.best) / 10)
    assert found.complete


@given(FACTORS, st.floats(0, 0.5))
def test_never_slower_than_the_plan_in_both_turns(
    factors: dict[tuple[str, str], float], noise: float
) -> None:
    server = MadeUp(factors, noise=noise)
    found = search(KNOBS, server.run, server.seconds)
    assert not found.best or min(found.gains) > 1
    confirmed = [changes for changes, confirming in server.asked if confirming]
    if confirmed:
        assert confirmed == [{}, confirmed[1], confirmed[1], {}]
        assert confirmed[1]


def test_a_winner_by_chance_is_not_kept() -> None:
    server = MadeUp({})
    rates = iter([10.0, 15.0, *[10.0] * 20])
    found = search(KNOBS, lambda changes, confirming: next(rates), server.seconds)
    assert found.trials[1].rate == 15
    assert (found.best, found.gain) == ({}, 1.0)
    assert found.gains == (1.0, 1.0)


def test_a_server_that_does_not_start_is_passed_over() -> None:
    server = MadeUp({("A", "2"): 1.5, ("C", "1"): 9.0})
    server.failing = ("C", "1")
    found = search(KNOBS, server.run, server.seconds)
    assert found.best == {"A": "2"}
    assert [trial.failure for trial in found.trials if trial.failure] == ["it does not start"]


def test_the_plan_has_to_start() -> None:
    def run(changes: Mapping[str, str], confirming: bool) -> float:
        raise LvllmError("no memory")

    with pytest.raises(LvllmError, match="no memory"):
        search(KNOBS, run, lambda: 1e9)


@given(st.floats(1, 150))
def test_time_is_left_to_confirm(seconds: float) -> None:
    server = MadeUp({("A", "1"): 2.0}, seconds)
    found = search(KNOBS, server.run, server.seconds)
    # The plan's own trial is always made; all else stays within the time.
    assert server.left >= min(seconds - 10, 0)
    assert found.complete == (seconds >= 10 * (7 + CONFIRMING))
    if seconds >= 10 * (2 + CONFIRMING):
        assert found.best == {"A": "1"}

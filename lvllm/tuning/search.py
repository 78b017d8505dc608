"""Tries settings one after the other, and keeps what is faster than the plan for certain."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lvllm.errors import LvllmError

__all__ = ["CONFIRMING", "Knob", "Outcome", "Run", "Trial", "search"]

BETTER = 1.02
"""A setting is kept if the rate is so many times the best one before; less is noise."""
CONFIRMING = 4
"""Trials in which the best settings and the plan take turns in the end."""


@dataclass(frozen=True)
class Knob:
    """A setting and the values to try beside the one it has."""

    name: str
    """The environment variable."""
    values: tuple[str, ...]
    changes_results: bool = False


@dataclass(frozen=True)
class Trial:
    """Settings with their rate, or with the reason why they have none."""

    changes: Mapping[str, str]
    rate: float = 0
    failure: str | None = None


Run = Callable[[Mapping[str, str], bool], float]
"""Measures the plan with changes, in tokens a second; the flag says that this is to confirm the
best ones. It raises LvllmError if the server does not start or does not answer."""


@dataclass(frozen=True)
class Outcome:
    """What a search found."""

    trials: tuple[Trial, ...]
    """In their order, the plan first, without those of the confirmation."""
    best: Mapping[str, str]
    """Changes to the plan; empty: nothing was faster for certain."""
    gains: tuple[float, ...]
    """How many times as fast as the plan the best settings were, each time they took turns."""
    complete: bool
    """Whether everything was tried before the time was up."""

    @property
    def gain(self) -> float:
        """The mean of `gains` if they confirm the best settings, and 1 otherwise."""
        if not self.best:
            return 1.0
        return math.prod(self.gains) ** (1 / len(self.gains))


def search(knobs: Sequence[Knob], run: Run, seconds_left: Callable[[], float]) -> Outcome:
    """Go through the knobs, and keep each value that is faster than all before.

    In the end the best settings and the plan take turns, plan, best, best, plan, so that a machine
    that becomes slower or faster meanwhile favours neither. Settings that are not faster in both
    turns are not kept. Time for that is reserved: the longest trial so far tells how much.

    Raises what `run` raises with the plan's own settings.
    """
    longest = 0.0

    def timed(changes: Mapping[str, str], confirming: bool) -> float:
        nonlocal longest
        before = seconds_left()
        try:
            return run(changes, confirming)
        finally:
            longest = max(longest, before - seconds_left())

    plan = best = Trial({}, timed({}, False))
    trials = [plan]
    complete = True
    for knob in knobs:
        for value in knob.values:
            if seconds_left() < (1 + CONFIRMING) * longest:
                complete = False
                break
            changes = {**best.changes, knob.name: value}
            try:
                trial = Trial(changes, timed(changes, False))
            except LvllmError as error:
                trial = Trial(changes, failure=str(error))
            trials.append(trial)
            if trial.rate > BETTER * best.rate:
                best = trial
    gains: tuple[float, ...] = ()
    if best.changes:
        gains = _confirm(best.changes, timed)
    kept = best.changes if gains and min(gains) > 1 else {}
    return Outcome(tuple(trials), kept, gains, complete)


def _confirm(changes: Mapping[str, str], run: Run) -> tuple[float, ...]:
    """How many times as fast as the plan; nothing if the server fails now."""
    try:
        plan, best = run({}, True), run(changes, True)
        best_again, plan_again = run(changes, True), run({}, True)
    except LvllmError:
        return ()
    return best / plan, best_again / plan_again

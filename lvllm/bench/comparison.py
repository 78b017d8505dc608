"""Each result beside what the plan predicted and what stock vLLM did."""

from collections.abc import Sequence

from pydantic import BaseModel

from lvllm.bench.speed import Result
from lvllm.planning.machine import Machine
from lvllm.planning.placement import Load
from lvllm.planning.speed import limit, predict
from lvllm.serving.defaults import Defaults

__all__ = ["RIGHT", "Planned", "Report", "Row", "misses", "planned"]

RIGHT = 0.25
"""A prediction may be off by this share of itself."""


class Planned(BaseModel):
    """Tokens a second that the plan predicts, and what limits them."""

    prefill_rate: float
    prefill_limit: str
    decode_rate: float
    decode_limit: str


class Row(BaseModel):
    """A result with all that it is compared with."""

    measured: Result
    planned: Planned | None = None
    stock: Result | None = None
    """Stock vLLM's result with the same weights and requests."""


class Report(BaseModel):
    """Everything that was measured of a model."""

    model: str
    """Empty: the first one of the server."""
    server: str
    """Its URL, or the command that started it."""
    way: str | None
    """How the plan runs the model; None: there is no plan."""
    machine: Machine | None
    """What the plan knows of this machine."""
    rows: list[Row]

    @property
    def title(self) -> str:
        """The model and how it runs."""
        return f"{self.model or self.server}: {self.way}" if self.way else self.model or self.server


def planned(plan: Defaults | None, one: Result) -> Planned | None:
    """What a plan says of the requests behind a result; None if there is no plan."""
    if plan is None or plan.best is None:
        return None
    best = plan.best
    load = Load(one.prompt, one.answer, one.users, best.load.context, best.load.batch)
    speed = predict(plan.model, plan.machine, best.how, load)
    return Planned(
        prefill_rate=speed.prefill_rate,
        prefill_limit=limit(speed.prefill),
        decode_rate=speed.decode_rate,
        decode_limit=limit(speed.decode),
    )


def misses(rows: Sequence[Row]) -> list[str]:
    """One line for each prediction that is off by more than `RIGHT`."""
    lines = []
    for row in rows:
        one, plan = row.measured, row.planned
        if plan is None:
            continue
        users = f"{one.users} user{'s' * (one.users > 1)}"
        decode = f"decode with {users} behind {one.prompt} tokens"
        for what, seen, said, limits in (
            (f"prefill of {one.prompt}", one.prefill_rate, plan.prefill_rate, plan.prefill_limit),
            (decode, one.decode_rate, plan.decode_rate, plan.decode_limit),
        ):
            if seen is not None and abs(seen / said - 1) > RIGHT:
                lines.append(
                    f"{what}: {seen:.1f} tokens/s, and {said:.1f} were planned (limit: {limits})"
                )
    return lines

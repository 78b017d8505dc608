"""The tables of predictions, and of what others published."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import yaml

from benchmarks.gpu_model.layers import Parts
from benchmarks.gpu_model.machines import MACHINES, NAMES
from benchmarks.gpu_model.models import CHUNK, SHAPES, model
from benchmarks.gpu_model.predictions import LONG, Prediction
from benchmarks.gpu_model.prefill import Spent
from lvllm.planning import gpu_time

__all__ = ["decoding", "machines", "others", "prediction", "prediction_row", "predictions", "table"]

USERS = (1, 8)
PUBLISHED = Path(__file__).with_name("published.yaml")


def table(head: str, rows: Sequence[Sequence[str]]) -> str:
    """Rows in Markdown under a head whose columns are separated by `|`."""
    columns = head.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


@cache
def prediction(name: str, format: str, machine: str) -> Prediction:
    """A model of SHAPES in int4 or bf16 on one of MACHINES."""
    return Prediction(Parts(model(name, format), MACHINES[machine]))


def machines() -> str:
    """The rates that the predictions use."""
    rows = []
    for name, one in MACHINES.items():
        assert one.gpu, "all machines here have a GPU"
        lk = " / ".join(f"{2e-12 * one.products(format):.1f}" for format in ("int4", "bf16"))
        rates = (
            f"{one.gpu.bus_gb_per_s:.1f}",
            f"{gpu_time.READ * one.gpu.read_gb_per_s:.0f}",
            f"{gpu_time.MULTIPLY * one.gpu.bf16_tflop_per_s:.0f}",
        )
        rows.append((name, NAMES[name], f"{one.read_gb_per_s:.0f}", lk, *rates))
    return table(
        "name | machine | host memory, GB/s | lk, int4 / bf16, TFLOP/s | bus of a GPU, GB/s"
        " | its memory, GB/s | its products, TFLOP/s",
        rows,
    )


def predictions() -> str:
    """Prefill, break-even and decoding with all experts on the host."""
    return table(
        "model | machine | prefill 8K | 32K in chunks | 32K at once | bound | break-even"
        " | decode, 1 user | 8 users | bound",
        [prediction_row(*one) for one in _all()],
    )


def prediction_row(name: str, format: str, machine: str) -> tuple[str, ...]:
    """One row of predictions."""
    one = prediction(name, format, machine)
    row = (f"{name} {format}", machine)
    if one.lacks:
        return *row, f"does not fit: {one.lacks}", *[""] * 7
    steps = [one.decode(users) for users in USERS]
    return (
        *row,
        *(_rate(*each) for each in ((CHUNK, one.short), *_long(one))),
        one.short.bound,
        str(one.prefill.threshold),
        *(f"{step.rate:.1f}" if step else "-" for step in steps),
        " / ".join(step.bound if step else "-" for step in steps),
    )


def decoding() -> str:
    """Decoding with other places of the experts and other calls."""
    rows = []
    for name, format, machine in _all():
        one = prediction(name, format, machine)
        for users in USERS:
            base = one.decode(users)
            if one.lacks or base is None:
                continue
            count, resident = one.resident(users)
            layers = len(one.parts.model.moe_layers)
            rates = [base, one.mailbox(users), one.deferred(users), resident]
            if count < layers:
                rates += [one.cached(users, skew) for skew in ("even", "skewed")]
            cells = [f"{step.rate:.1f}" for step in rates] + [""] * (6 - len(rates))
            cells[3] += f" ({count} of {layers})"
            rows.append((f"{name} {format}", machine, str(users), *cells))
    return table(
        "model | machine | users | all on the host | mailbox | 2 of 8 deferred | whole layers"
        " | cache, even | cache, skewed",
        rows,
    )


def others() -> str:
    """What others published, and the nearest prediction."""
    rows = []
    for one in yaml.safe_load(PUBLISHED.read_text()):
        ours = ["", "", ""]
        if nearest := one.get("nearest"):
            near = prediction(*nearest)
            step = near.decode(1)
            assert step, nearest
            ours = [" ".join(nearest), _rate(CHUNK, near.short), f"{step.rate:.1f}"]
        known = [f"{one[kind]:g}" if kind in one else "" for kind in ("prefill", "decode")]
        rows.append((one["engine"], one["what"], one["machine"], *known, *ours, one["source"]))
    return table(
        "engine | what | on | prefill | decode | our nearest prediction | prefill 8K | decode"
        " | source",
        rows,
    )


def _all() -> Iterator[tuple[str, str, str]]:
    """All models on all machines; those in bf16 only where they fit."""
    for name in SHAPES:
        for format in ("int4", "bf16"):
            for machine in MACHINES:
                if format == "int4" or not prediction(name, format, machine).lacks:
                    yield name, format, machine


def _long(one: Prediction) -> list[tuple[int, Spent | None]]:
    return [(LONG, one.long(CHUNK)), (LONG, one.long(LONG))]


def _rate(tokens: int, spent: Spent | None) -> str:
    return f"{tokens / spent.seconds:.0f}" if spent else "-"

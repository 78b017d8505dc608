"""What counting costs an expert block: the same calls with and without counters, in turns.

    python -m benchmarks.counting_cost [--shape 2048x768x128x8] [--format int4] [--rounds 1000]

Other work of the machine only adds time, so the shortest round of each kind counts. A round is many
calls, one after the other; each call has other experts, as in decoding.
"""

from __future__ import annotations

import json
import time
from statistics import median
from typing import Annotated

import torch
import typer

from benchmarks.cases import Batch, Shape, batch
from benchmarks.peers import lk
from benchmarks.peers.settings import Settings
from benchmarks.weights import RandomWeights
from lvllm.engine import ExpertLayer, counters

SECONDS = 0.005
"""The time of a round: short, so that some rounds fall between the work of other processes."""
BATCHES = 64


def counting_cost(shape: Shape, format: str, threads: int, rounds: int) -> dict[str, float]:
    """Microseconds of a call with one token, and what counting adds to them in percent."""
    layer = lk.prepare(RandomWeights(shape, format, 0), Settings(threads))
    batches = [batch(shape, 1, seed, torch.bfloat16) for seed in range(BATCHES)]
    numbers = torch.zeros(counters.size(shape.experts), dtype=torch.int64)
    times: dict[bool, list[float]] = {False: [], True: []}
    calls = 1
    while _round(layer, batches, calls) * calls < SECONDS * 1e6:  # also a warm-up
        calls *= 2
    for number in range(2 * rounds):
        counted = number % 2 == 1
        counters.count(layer.handle, numbers if counted else None)
        times[counted].append(_round(layer, batches, calls))
    assert int(numbers[counters.calls(counters.Reason.NO_GPU)]) == rounds * calls
    without, with_counters = min(times[False]), min(times[True])
    return {
        "calls_per_round": calls,
        "without_us": without,
        "with_us": with_counters,
        "cost_us": with_counters - without,
        "cost_percent": 100 * (with_counters / without - 1),
        "median_without_us": median(times[False]),
        "median_with_us": median(times[True]),
    }


def _round(layer: ExpertLayer, batches: list[Batch], calls: int) -> float:
    """Microseconds of a call, on average."""
    start = time.perf_counter()
    for call in range(calls):
        lk.run(layer, batches[call % BATCHES])
    return 1e6 * (time.perf_counter() - start) / calls


def main(
    shape: Annotated[str, typer.Option(help="As of benchmarks/moe_block.py.")] = "tiny",
    format: Annotated[str, typer.Option(help="The weights' format.")] = "int4",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each kind.")] = 1000,
) -> None:
    """Print what counting costs a layer in decoding."""
    print(json.dumps(counting_cost(Shape.parse(shape), format, threads, rounds), indent=2))


if __name__ == "__main__":
    typer.run(main)

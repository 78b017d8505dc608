"""The cost of a call: the time of an expert block that has next to nothing to compute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.cases import Batch, Shape, batch
from benchmarks.peers import lk
from benchmarks.peers.settings import Settings
from benchmarks.weights import RandomWeights

SHAPE = Shape(64, 32, 4, 2)  # 25,000 operations and 24 KiB of weights take less than 0.5 us.
THREADS = 2
CALLS = 20_000
PAUSED_CALLS = 300
PAUSE = 0.002  # Seconds; after that the workers sleep.


def _microseconds(call: Callable[[], object], calls: int, pause: float) -> list[float]:
    times = []
    for _ in range(calls):
        if pause:
            time.sleep(pause)
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return times


def call_cost(threads: int) -> dict[str, float]:
    """Microseconds of a call, as median and 99th percentile. All of that time counts as cost.

    "busy" calls follow each other while the workers still spin. "idle" calls come after a pause,
    when the workers sleep. "empty" calls have no token: they show the cost of Python, of
    dispatching the op and of making the output.
    """
    layer = lk.prepare(RandomWeights(SHAPE, "bf16", 0), Settings(threads))
    one = batch(SHAPE, 1, 0, torch.bfloat16)
    none = Batch(one.x[:0], one.ids[:0], one.weights[:0])
    found: dict[str, float] = {}
    for name, data, calls, pause in (
        ("busy", one, CALLS, 0.0),
        ("idle", one, PAUSED_CALLS, PAUSE),
        ("empty", none, CALLS, 0.0),
    ):
        call = partial(lk.run, layer, data)
        _microseconds(call, 100, 0.0)
        times = _microseconds(call, calls, pause)
        found[f"{name}_us"] = statistics.median(times)
        found[f"{name}_p99_us"] = statistics.quantiles(times, n=100)[98]
    return found

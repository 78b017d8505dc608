"""Measure the machine's rates with PyTorch, on as many threads as the engines have."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable

import torch

from lvllm import engine
from lvllm.machine.facts import cpu
from lvllm.machine.measure.reading import engine_reader

READ_SECONDS = 0.02
TRIES = 2  # The better one counts.
PEAK_SIZE = 1536  # Rows of the square matrices that are multiplied.


def seconds(call: Callable[..., object], *args: object) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


class Probes:
    def __init__(self) -> None:
        self._reader = engine_reader()
        # The faster of bf16 and float32 counts, since not every CPU multiplies bf16.
        before = _threads()
        pairs = [
            torch.randn(2, PEAK_SIZE, PEAK_SIZE).to(dtype)
            for dtype in (torch.bfloat16, torch.float32)
        ]
        for pair in pairs:
            self._multiply(pair)
        _pin([0, *sorted(_threads() - before)])
        self._operands = min(pairs, key=self._multiply)

    @staticmethod
    def _multiply(pair: torch.Tensor) -> float:
        return seconds(torch.matmul, pair[0], pair[1])

    def read_rate(self) -> float:
        """Bytes a second, where each thread reads its node's memory in sequence."""
        return self._reader.local_rate(READ_SECONDS, TRIES)

    def matrix_rate(self) -> float:
        """Operations a second in a product of square matrices."""
        return max(2 * PEAK_SIZE**3 / self._multiply(self._operands) for _ in range(TRIES))


def _threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def _pin(threads: list[int]) -> None:
    """Pin each thread to a core of its own; 0 is the calling thread.

    After a long sleep threads wake up on one core and stay there for milliseconds, which halves a
    rate.
    """
    cores = [core for node in engine.topology().nodes for core in node.cores]
    for thread, core in zip(threads, cores, strict=False):
        os.sched_setaffinity(thread, core)


def last_level_cache() -> int:
    """Bytes of all last-level caches together; 32 MiB if the system does not say."""
    return cpu.last_level_cache_bytes() or 32 << 20


def machine() -> dict[str, object]:
    info = engine.info()
    return {
        "cpu": cpu.model() or platform.processor(),
        "physical_cores": engine.topology().physical_cores,
        "numa_nodes": list(info.nodes),
        "threads": info.threads,
        "isa": info.isa,
        "huge_pages": info.huge_pages,
        "last_level_cache_bytes": last_level_cache(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }

"""How fast threads read memory, on and between NUMA nodes.

The threads are Python's, pinned to the CPUs of the engine's threads. Each adds up a part of the
memory in sequence with PyTorch, which lets other threads run meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import groupby

import torch

from lvllm import engine
from lvllm.engine import bank
from lvllm.machine.facts.cpu import last_level_cache_bytes
from lvllm.machine.thread_pool import pool

__all__ = ["Reader", "engine_reader", "wanted_bytes"]

PROBE_BYTES = 256 << 20
"""Memory of each node beside twice its caches."""
ROW_BYTES = 2 << 20
"""A huge page. The memory is placed on nodes in rows."""
PIECE_BYTES = 16 << 20
"""Between pieces a thread needs Python's lock, which all threads share. A piece takes a millisecond
or more, and the lock a few microseconds."""
HANGS = 60
"""Seconds after which threads that never began are an error."""


class Reader:
    """Threads on NUMA nodes, and memory that they read.

    Use it as a context manager, which ends the threads.
    """

    def __init__(
        self, workers: Sequence[tuple[int, Sequence[int]]], memory: Mapping[int, torch.Tensor]
    ) -> None:
        """
        Args:
            workers: the node and the logical CPUs of each thread.
            memory: contiguous float32 on each node, by the node's number.
        """
        self._workers = list(workers)
        self._memory = {node: words.view(-1) for node, words in memory.items()}
        everywhere = sorted({cpu for _, cpus in workers for cpu in cpus})
        self._pool = pool(len(self._workers), everywhere)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def nodes(self) -> list[int]:
        """The nodes that have threads and memory."""
        return sorted({node for node, _ in self._workers} & self._memory.keys())

    def threads(self, node: int) -> int:
        return sum(home == node for home, _ in self._workers)

    def rate(self, sources: Mapping[int, int], seconds: float, tries: int = 1) -> float:
        """Bytes a second that the threads of each key read together in the memory of its value.

        Each try takes about `seconds`. The best one counts, since other programs only take away.
        Raises ValueError for nodes without threads or without memory.
        """
        if not sources.keys() <= {node for node, _ in self._workers}:
            raise ValueError(f"nodes are {sorted(sources)}, and not all of them have threads")
        if not set(sources.values()) <= self._memory.keys():
            raise ValueError(f"memory is of {sorted(sources.values())}, and not all have memory")
        jobs: list[tuple[Sequence[int], torch.Tensor]] = []
        for node, target in sources.items():
            parts = self._memory[target].chunk(self.threads(node))
            cpus = [cpus for home, cpus in self._workers if home == node]
            # More threads than elements would leave some without a part.
            jobs += list(zip(cpus, parts, strict=False))
        return max(self._try(jobs, seconds) for _ in range(tries))

    def _try(self, jobs: Sequence[tuple[Sequence[int], torch.Tensor]], seconds: float) -> float:
        start = threading.Barrier(len(jobs))
        running = [self._pool.submit(_read, *job, start, seconds) for job in jobs]
        return sum(one.result() for one in running)

    def local_rate(self, seconds: float, tries: int = 1) -> float:
        """Bytes a second that all threads read together, each in the memory of its own node."""
        return self.rate({node: node for node in self.nodes()}, seconds, tries)


def _read(
    cpus: Sequence[int], words: torch.Tensor, start: threading.Barrier, seconds: float
) -> float:
    """Bytes a second of one thread. Each has its own clock, so that none waits for another.

    A thread that the kernel takes a core from slows down itself, and not the result of all others.
    """
    os.sched_setaffinity(0, cpus)
    pieces = words.split(PIECE_BYTES // words.element_size())
    start.wait(HANGS)
    begin = time.perf_counter()
    done = 0
    while True:
        for piece in pieces:
            piece.sum()
            done += piece.nbytes
            took = time.perf_counter() - begin
            if took >= seconds:
                return done / took


def wanted_bytes(nodes: int) -> int:
    """The memory that an `engine_reader` has on so many nodes, if that is free."""
    # Twice the caches, so that hardly anything of the last pass is still in them.
    return nodes * PROBE_BYTES + 2 * (last_level_cache_bytes() or 0)


def engine_reader(most_bytes: int | None = None) -> Reader:
    """A reader with the CPUs of the engine's threads and memory on their nodes.

    Args:
        most_bytes: of memory, for all nodes together; by default an eighth of what is free.

    Raises:
        MemoryError: if there is too little memory.
    """
    info = engine.info()
    most = bank.available_bytes() // 8 if most_bytes is None else most_bytes
    rows = max(len(info.nodes), min(wanted_bytes(len(info.nodes)), most) // ROW_BYTES)
    words = bank.allocate((1, rows, ROW_BYTES // 4), torch.float32)[0]
    words.fill_(1)  # Pages that nobody has written are one page of zeros.
    workers = list(zip(info.worker_nodes, info.cpus, strict=True))
    return Reader(workers, _by_node(words, info.nodes))


def _by_node(words: torch.Tensor, nodes: Sequence[int]) -> dict[int, torch.Tensor]:
    """The longest run of rows that lies on each node, by what the kernel says."""
    if len(nodes) == 1:
        return {nodes[0]: words}
    homes = bank.page_nodes(words.view(-1), step=ROW_BYTES)
    runs: dict[int, torch.Tensor] = {}
    begin = 0
    for node, group in groupby(homes):
        end = begin + len(list(group))
        if node >= 0 and end - begin > len(runs.get(node, ())):
            runs[node] = words[begin:end]
        begin = end
    return runs

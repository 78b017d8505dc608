"""Threads that read memory on made-up nodes, which have this machine's CPUs."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from lvllm import engine
from lvllm.machine.measure import reading
from lvllm.machine.measure.reading import Reader, engine_reader

CPUS = sorted(os.sched_getaffinity(0))
WORDS = 1 << 18


@pytest.fixture
def reader() -> Iterator[Reader]:
    """Node 0 has two threads, node 1 one thread, node 2 only memory, and node 3 only a thread."""
    memory = {node: torch.full((WORDS,), float(node)) for node in range(3)}
    workers = [(0, CPUS[:1]), (1, CPUS), (0, CPUS[-1:]), (3, CPUS)]
    with Reader(workers, memory) as made:
        yield made


def test_nodes_with_threads_and_memory(reader: Reader) -> None:
    assert reader.nodes() == [0, 1]
    assert [reader.threads(node) for node in range(4)] == [2, 1, 0, 1]


def test_threads_of_each_node_read_the_memory_asked_for(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[tuple[int, ...], float, int]] = set()

    def read(cpus: list[int], words: torch.Tensor, start: threading.Barrier, s: float) -> float:
        start.wait(10)
        seen.add((tuple(cpus), words[0].item(), words.numel()))
        return 1.0

    monkeypatch.setattr(reading, "_read", read)
    assert reader.rate({0: 2, 3: 1}, 0.01) == 3
    first, last = tuple(CPUS[:1]), tuple(CPUS[-1:])
    half = WORDS // 2
    assert seen == {(first, 2, half), (last, 2, half), (tuple(CPUS), 1, WORDS)}
    seen.clear()
    reader.local_rate(0.01)
    assert {value for _, value, _ in seen} == {0, 1}


def test_a_rate_is_bytes_in_time(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread reads pieces until the clock, which here goes on 0.5 s at each look, says 2 s."""
    times = iter(range(1000))
    monkeypatch.setattr(reading.time, "perf_counter", lambda: next(times) / 2)
    monkeypatch.setattr(reading, "PIECE_BYTES", WORDS)  # a quarter of the memory
    assert reader.rate({1: 1}, 2.0) == 4 * WORDS / 2


def test_the_best_try_counts(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(reading, "_read", lambda *job: next(rates))
    assert reader.rate({1: 1}, 0.01, tries=3) == 3


@pytest.mark.parametrize("sources", [{2: 0}, {0: 3}, {0: 7}])
def test_nodes_without_threads_or_memory_are_refused(
    reader: Reader, sources: dict[int, int]
) -> None:
    with pytest.raises(ValueError, match=r"nodes are|memory is"):
        reader.rate(sources, 0.01)


def test_the_calling_thread_keeps_its_affinity(reader: Reader) -> None:
    before = os.sched_getaffinity(0)
    assert reader.local_rate(0.01) > 0
    assert os.sched_getaffinity(0) == before


def test_the_engines_threads_read_the_engines_memory() -> None:
    info = engine.info()
    with engine_reader(most_bytes=8 << 20) as made:
        assert made.nodes() == sorted(set(info.nodes))
        assert sum(made.threads(node) for node in made.nodes()) == info.threads
        assert made.local_rate(0.01) > 0


def test_memory_is_taken_from_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest run of each node counts. -1 stands for pages that do not exist."""
    monkeypatch.setattr(reading, "ROW_BYTES", 4096)
    words = torch.arange(8.0)[:, None].expand(8, 1024).contiguous()
    monkeypatch.setattr(reading.bank, "page_nodes", lambda words, step: [0, 0, 1, 0, 5, 5, 5, -1])
    runs = reading._by_node(words, (0, 5))
    assert {node: rows[:, 0].tolist() for node, rows in runs.items()} == {
        0: [0, 1],
        1: [2],
        5: [4, 5, 6],
    }

"""Ranks get the CPUs near their GPUs, on a made-up machine."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.platforms

from lvllm.machine import cpus, gpu_distance

# The machine has two sockets of two nodes of two cores. ROWS has the distances of each node.
MACHINE: cpus.Machine = [[[0], [1]], [[2], [3]], [[4], [5]], [[6], [7]]]
ROWS = ["10 12 32 32", "12 10 32 32", "32 32 10 12", "32 32 12 10"]


def test_distances_of_the_kernel(tmp_path: Path) -> None:
    """Node 1 is missing, so the kernel's rows have no number for it."""
    for node, row in ((0, "10 21 31"), (2, "21 10 17"), (10, "31 17 10")):
        folder = tmp_path / "devices" / "system" / "node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "distance").write_text(f"{row}\n")
    found = gpu_distance.between_nodes(tmp_path)
    assert (found[0, 0], found[0, 2], found[2, 10], found[10, 0]) == (10, 21, 17, 31)
    assert len(found) == 9
    assert gpu_distance.between_nodes(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("ranks", "homes", "expected"),
    [
        (1, [3], [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (2, [3, 0], [[4, 5, 6, 7], [0, 1, 2, 3]]),
        (2, [3, 2], [[4, 5, 6, 7], [0, 1, 2, 3]]),
        (2, [None, 0], [[4, 5, 6, 7], [0, 1, 2, 3]]),
        (2, [None, None], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, [2, 2, 0, 0], [[4, 5], [6, 7], [0, 1], [2, 3]]),
        (8, [3, 3, 2, 2, 1, 1, 0, 0], [[6], [7], [4], [5], [2], [3], [0], [1]]),
    ],
)
def test_ranks_get_the_cpus_near_their_gpus(
    ranks: int, homes: list[int | None], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [
        SimpleNamespace(id=n, cpus=tuple(cpu for core in node for cpu in core))
        for n, node in enumerate(MACHINE)
    ]
    gpus = SimpleNamespace(is_cuda=lambda: True, get_device_numa_node=homes.__getitem__)
    monkeypatch.setattr(vllm.platforms, "current_platform", gpus)
    monkeypatch.setattr(gpu_distance.engine, "topology", lambda: SimpleNamespace(nodes=nodes))
    rows = {(a, b): int(n) for a, row in enumerate(ROWS) for b, n in enumerate(row.split())}
    monkeypatch.setattr(gpu_distance, "between_nodes", lambda: rows)
    of_gpus = gpu_distance.of_gpus()
    assert of_gpus is not None
    shares = cpus.assign(cpus.divide(MACHINE, ranks), of_gpus)
    assert [[cpu for node in s for core in node for cpu in core] for s in shares] == expected


def test_without_gpus_ranks_keep_their_order() -> None:
    assert gpu_distance.of_gpus() is None or vllm.platforms.current_platform.is_cuda()

"""Memory, NUMA nodes and settings of the kernel, on made-up machines."""

from pathlib import Path

import pytest

from lvllm.machine.facts import kernel
from lvllm.machine.report import HugePages, Kernel
from lvllm.units import GIB
from tests.machine import made_up


def test_eight_nodes(tmp_path: Path) -> None:
    """Node 6 has CPUs and no memory, and node 7 memory and no CPUs. Node 3 is missing."""
    ids = [0, 1, 2, 4, 5, 6, 7, 10]
    files: dict[str, str] = {}
    for place, id in enumerate(ids):
        row = [10 if place == other else 12 + other for other in range(len(ids))]
        cpus = "" if id == 7 else f"{4 * id}-{4 * id + 3}"
        gib = 0 if id == 6 else 64
        files |= made_up.node(id, cpus, gib, gib // 2, row)
    found = kernel.nodes(made_up.write(tmp_path, files))
    assert [node.id for node in found] == ids
    nodes = {node.id: node for node in found}
    assert nodes[10].cpus == [40, 41, 42, 43]
    assert nodes[7].cpus == []
    assert nodes[6].memory_bytes == 0
    assert nodes[0].memory_bytes == 64 * GIB
    assert nodes[0].free_bytes == 32 * GIB + (1 << 20)
    assert (nodes[4].distances[4], nodes[4].distances[10]) == (10, 19)


def test_distances_of_another_length_are_unknown(tmp_path: Path) -> None:
    files = made_up.node(0, "0", 1, 1, (10, 20, 20)) | made_up.node(1, "1", 1, 1, (20, 10))
    first, second = kernel.nodes(made_up.write(tmp_path, files))
    assert (first.distances, second.distances) == ({}, {0: 20, 1: 10})


def test_settings(tmp_path: Path) -> None:
    huge = "sys/kernel/mm/hugepages"
    files = {
        "proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 50 kB\nSwapTotal: 9 kB\nSwapFree: 2 kB\n",
        "proc/loadavg": "1.25 0.5 0.1 1/100 7\n",
        "proc/sys/kernel/osrelease": "6.1.0-x\n",
        "proc/sys/kernel/numa_balancing": "1\n",
        "proc/sys/vm/overcommit_memory": "2\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
        f"{huge}/hugepages-1048576kB/nr_hugepages": "4\n",
        f"{huge}/hugepages-1048576kB/free_hugepages": "3\n",
        f"{huge}/hugepages-2048kB/nr_hugepages": "x\n",
    }
    assert kernel.read(made_up.write(tmp_path, files)) == Kernel(
        version="6.1.0-x",
        load_average=1.25,
        memory_bytes=100 << 10,
        available_bytes=50 << 10,
        swap_bytes=9 << 10,
        swap_used_bytes=7 << 10,
        transparent_huge_pages="never",
        huge_pages=[
            HugePages(page_bytes=2 << 20),
            HugePages(page_bytes=1 << 30, total=4, free=3),
        ],
        numa_balancing=True,
        overcommit_memory=2,
    )


@pytest.mark.parametrize(("written", "on"), [("0", False), ("1", True), ("2", False), ("3", True)])
def test_balancing_between_kinds_of_memory_is_no_balancing(
    tmp_path: Path, written: str, on: bool
) -> None:
    files = {"proc/sys/kernel/numa_balancing": written}
    assert kernel.read(made_up.write(tmp_path, files)).numa_balancing is on


def test_nothing_is_there(tmp_path: Path) -> None:
    assert kernel.read(tmp_path) == Kernel()
    assert kernel.nodes(tmp_path) == []


def test_the_real_files_of_the_kernel_are_read() -> None:
    """Some files refuse reads that made-up files allow, such as very long ones."""
    assert kernel.read().version == Path("/proc/sys/kernel/osrelease").read_text().strip()
    assert kernel.read().overcommit_memory in (0, 1, 2)

"""What Python sees of the machine, and what configure() makes of it."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lvllm import engine


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    yield
    engine.configure()


def test_this_machine() -> None:
    engine.configure()
    topology, info = engine.topology(), engine.info()
    assert set(topology.cpus) == os.sched_getaffinity(0)
    assert info.threads == topology.physical_cores
    assert set(info.nodes) <= {node.id for node in topology.nodes}
    assert all(len(cpus) == 1 for cpus in info.cpus)
    assert sum(node.memory_bytes for node in topology.nodes) > 0


def test_synthetic_machine() -> None:
    engine.configure(topology="3 nodes x 2,3,0 cores x 2 threads", threads=7)
    topology, info = engine.topology(), engine.info()
    assert [len(node.cores) for node in topology.nodes] == [2, 3, 0]
    assert topology.physical_cores == 5
    assert len(topology.cpus) == 10
    # Five cores first; the two threads more go to SMT siblings of both nodes.
    assert info.worker_nodes == (0, 0, 0, 1, 1, 1, 1)
    assert len(set(info.cpus)) == 7


def test_node_binding() -> None:
    engine.configure(topology="2 nodes x 2 cores x 1 threads", binding="NUMA_NODE")
    assert engine.info().cpus == ((0, 1), (0, 1), (2, 3), (2, 3))
    assert engine.info().binding == "NUMA_NODE"


def test_power_saving_and_own_cores_are_kept() -> None:
    engine.configure(power_saving=True)
    assert (engine.info().power_saving, engine.info().own_cores) == (True, False)
    engine.configure(own_cores=True)
    assert (engine.info().power_saving, engine.info().own_cores) == (False, True)


def test_chosen_cpus() -> None:
    first = min(os.sched_getaffinity(0))
    engine.configure(cpus=[first])
    assert engine.info().cpus == ((first,),)
    assert engine.topology().cpus == (first,)


def test_affinity_mask_is_obeyed() -> None:
    first = min(os.sched_getaffinity(0))
    program = (
        f"import os; os.sched_setaffinity(0, {{{first}}})\n"
        "from lvllm import engine; print(engine.info().threads, engine.topology().cpus)"
    )
    got = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert got.stdout == f"1 ({first},)\n", got.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0, must be at least 1"),
        ({"threads": 100_000}, r"threads is 100000, must be 1 to \d+, the CPUs"),
        ({"binding": "SOCKET"}, "binding is 'SOCKET', must be one of CPU_CORE, NUMA_NODE"),
        ({"cpus": []}, "cpus is empty"),
        ({"cpus": [9999]}, "CPU 9999 is not among"),
        ({"topology": "two nodes"}, 'topology "two nodes" is not of the form'),
        ({"topology": "2 nodes x 1,2,3 cores x 1 threads"}, "is not of the form"),
        ({"topology": "2 nodes x 0 cores x 1 threads"}, "at least one core"),
        ({"isa": "sse9"}, 'LK_ISA is "sse9"'),
    ],
)
def test_wrong_options_leave_the_engine_as_it_was(options: dict[str, object], message: str) -> None:
    engine.configure(threads=1)
    with pytest.raises(ValueError, match=message):
        engine.configure(**options)  # type: ignore[arg-type]
    assert engine.info().threads == 1

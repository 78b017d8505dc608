"""Division of a host's CPUs among ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvllm.machine import cpus


def machine(nodes: int, cores: int, smt: int = 1) -> cpus.Machine:
    """A machine whose CPUs are numbered as Linux does: second threads of cores come last."""
    total = nodes * cores
    return [
        [tuple(n * cores + c + t * total for t in range(smt)) for c in range(cores)]
        for n in range(nodes)
    ]


@pytest.mark.parametrize(
    ("nodes", "cores", "ranks", "expected"),
    [
        (1, 2, 1, 2),  # four cores or fewer: all of them
        (1, 4, 1, 4),
        (1, 5, 1, 1),  # physical cores minus 4
        (2, 32, 1, 60),
        (2, 32, 2, 30),  # divided by the ranks
        (1, 2, 4, 1),  # at least one
    ],
)
def test_default_threads(nodes: int, cores: int, ranks: int, expected: int) -> None:
    assert cpus.default_threads(machine(nodes, cores, smt=2), ranks) == expected


@pytest.mark.parametrize(
    ("cores", "ranks", "quota", "expected"),
    [
        (32, 1, None, 28),
        (32, 1, 64.0, 28),  # more than there is
        (32, 1, 8.0, 4),  # as on a machine of 8 cores
        (32, 1, 3.9, 3),
        (32, 2, 4.0, 2),
        (32, 1, 0.5, 1),  # at least one
        (2, 1, 1.5, 1),
    ],
)
def test_default_threads_by_quota(
    cores: int, ranks: int, quota: float | None, expected: int
) -> None:
    assert cpus.default_threads(machine(1, cores, smt=2), ranks, quota) == expected


def test_ranks_get_whole_nodes() -> None:
    assert cpus.divide(machine(4, 2), 2) == [machine(4, 2)[:2], machine(4, 2)[2:]]


def test_ranks_share_a_node_by_cores() -> None:
    assert cpus.divide(machine(1, 4), 2) == [[[(0,), (1,)]], [[(2,), (3,)]]]


def test_memory_only_nodes_get_no_rank() -> None:
    assert cpus.divide([[], *machine(1, 2)], 1) == [machine(1, 2)]


def test_spare_cores_come_evenly_from_the_nodes() -> None:
    chosen = cpus.choose(machine(2, 8), 12)
    assert [cpu for cpu in chosen if cpu < 8] == [0, 1, 2, 3, 4, 5]
    assert [cpu for cpu in chosen if cpu >= 8] == [8, 9, 10, 11, 12, 13]


def test_second_threads_of_cores_come_last() -> None:
    assert cpus.choose(machine(1, 4, smt=2), 6) == [0, 1, 2, 3, 4, 5]
    assert cpus.choose([[(0, 1), (2, 3)]], 3) == [0, 2, 1]


@given(
    st.lists(st.lists(st.integers(1, 2), max_size=5), min_size=1, max_size=8).filter(any),
    st.integers(1, 6),
)
def test_every_rank_can_be_served(shape: list[list[int]], ranks: int) -> None:
    """Two ranks have a CPU in common only if there are more ranks than cores."""
    ids = iter(range(1000))
    nodes = [[tuple(next(ids) for _ in range(smt)) for smt in node] for node in shape]
    cores = sum(map(len, nodes))
    shares = cpus.divide(nodes, ranks)
    assert len(shares) == ranks
    chosen = [cpus.choose(share, cpus.logical_cpus(share)) for share in shares]
    assert all(len(cpus) == len(set(cpus)) >= 1 for cpus in chosen)
    populated = [node for node in nodes if node]
    if ranks <= len(populated) or all(len(n) * len(populated) >= ranks + len(n) for n in populated):
        flat = [cpu for cpus in chosen for cpu in cpus]
        assert len(flat) == len(set(flat))
        if ranks <= cores:
            assert set(flat) == {cpu for node in nodes for core in node for cpu in core}


@given(st.integers(1, 32), st.integers(1, 64), st.integers(1, 2), st.integers(1, 16))
def test_no_more_threads_than_cores_by_default(
    nodes: int, cores: int, smt: int, ranks: int
) -> None:
    """This holds for the sum over all ranks, except that each rank has at least one thread."""
    each = cpus.default_threads(machine(nodes, cores, smt), ranks)
    assert each == 1 or each * ranks <= nodes * cores


def test_a_core_is_spared_if_none_of_its_threads_is_taken() -> None:
    two_cores = machine(1, 2, smt=2)
    first, second = two_cores[0]
    assert cpus.spares_a_core(two_cores, [first])
    assert cpus.spares_a_core([[], *two_cores], [[first[0]], [first[1]]])
    assert not cpus.spares_a_core(two_cores, [[first[0], second[1]]])
    assert not cpus.spares_a_core(two_cores, [first, second])

"""Where rows lie and who computes them, on this machine's nodes and on made-up ones."""

from collections.abc import Iterator

import pytest
import torch

from lvllm import engine
from lvllm.engine import bank

TILE_ROWS = 64
PAGE = 4096


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    engine.configure()
    yield
    engine.configure()


def test_interleaved_pages_lie_on_all_nodes() -> None:
    """Read back, and as many on each node; on one node they come when written, as ever."""
    engine.configure(interleave=True)
    huge = 2 << 20
    tensor = bank.allocate((16, 2, huge), torch.uint8, parts=2)
    assert set(bank.page_nodes(tensor)) == {-1}
    where = bank.page_nodes(tensor.fill_(1), step=huge)
    nodes = {node.id for node in engine.topology().nodes if node.memory_bytes}
    assert nodes <= set(where)
    counts = [where.count(node) for node in set(where)]
    assert max(counts) - min(counts) <= 1


def owners(rows: int, workers: list[int]) -> list[int]:
    """The node that computes each row of one part: whole tiles, in proportion to the workers."""
    tiles = -(-rows // TILE_ROWS)
    bounds = [tiles * sum(workers[:n]) // sum(workers) for n in range(len(workers) + 1)]
    return [
        next(n for n in range(len(workers)) if row // TILE_ROWS < bounds[n + 1])
        for row in range(rows)
    ]


@pytest.mark.parametrize(
    ("shape", "parts"),
    [((6, 1536, 2048), 2), ((6, 2048, 768), 1), ((3, 2 * 100, 1000), 2), ((2, 4096, 7168), 1)],
)
def test_pages_lie_on_the_node_that_computes_their_rows(
    shape: tuple[int, int, int], parts: int
) -> None:
    """Read back page by page, after a loader has written them. On one node: all of them on it."""
    info = engine.info()
    experts, rows, row_bytes = shape
    tensor = bank.allocate(shape, torch.uint8, parts=parts).fill_(1)
    where = bank.page_nodes(tensor, step=PAGE)
    assert len(where) == -(-experts * rows * row_bytes // PAGE)
    if len(info.nodes) == 1:
        assert set(where) == set(info.nodes)
        return
    owner = owners(rows // parts, [info.worker_nodes.count(node) for node in info.nodes])
    wanted = [
        info.nodes[owner[min(at + PAGE // 2, tensor.numel() - 1) // row_bytes % (rows // parts)]]
        for at in range(0, tensor.numel(), PAGE)
    ]
    cross = sum(have != want for have, want in zip(where, wanted, strict=True)) * PAGE
    # Huge pages may put an eighth on the wrong node, and a bank smaller than its page all of it.
    assert cross <= max(tensor.numel() // 8, PAGE)


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 32])
def test_workers_of_many_nodes(nodes: int) -> None:
    engine.configure(topology=f"{nodes} nodes x 3 cores x 2 threads")
    info = engine.info()
    assert info.nodes == tuple(range(nodes))
    assert info.worker_nodes == tuple(node for node in range(nodes) for _ in range(3))
    # The first thread of each core, and no CPU twice.
    assert [cpus[0] for cpus in info.cpus] == list(range(0, 6 * nodes, 2))


def test_uneven_nodes_and_one_with_memory_only() -> None:
    engine.configure(topology="4 nodes x 6,0,3,1 cores x 1 threads", threads=5)
    info = engine.info()
    assert info.nodes == (0, 2, 3)
    assert [info.worker_nodes.count(node) for node in info.nodes] == [3, 1, 1]


def test_chosen_cpus_can_leave_out_a_node() -> None:
    engine.configure(topology="2 nodes x 2 cores x 2 threads", cpus=[4, 5, 7])
    info = engine.info()
    assert info.nodes == (1,)
    assert info.cpus == ((4,), (7,))


def test_no_more_threads_than_cores_by_default() -> None:
    assert engine.info().threads == engine.topology().physical_cores

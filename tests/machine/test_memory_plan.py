"""Whether a model fits into the memory of a host, on made-up hosts."""

import re
from pathlib import Path

import pytest
import torch

from lvllm.engine import bank
from lvllm.machine import memory_plan
from lvllm.machine.memory_need import Need
from lvllm.machine.memory_plan import Rank, Room, free_on_nodes, node_shares, place
from lvllm.settings.variables import SettingError
from lvllm.units import GIB

ONE_NODE = [Rank({0: 4}, 0)]
TWO_NODES = [Rank({0: 4, 1: 4}, 0)]


def need(experts: float, others: float = 0, kv_cache: float = 0, int4: float = 1e6) -> Need:
    return Need(*(int(size * GIB) for size in (experts, others, kv_cache, int4)))


def room(total: float, *nodes: float) -> Room:
    return Room(int(total * GIB), {n: int(free * GIB) for n, free in enumerate(nodes)})


def refusal(*arguments: object) -> str:
    with pytest.raises(SettingError) as caught:
        place(*arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("may_interleave", [False, True])
def test_a_model_that_fits_is_not_interleaved(may_interleave: bool) -> None:
    assert not place(need(10, 4, 2), room(16, 16), ONE_NODE, may_interleave)
    assert not place(need(16, 4, 2), room(24, 14, 8), TWO_NODES, may_interleave)
    # Without NUMA information only the total counts.
    assert not place(need(16), room(16), ONE_NODE, may_interleave)


def test_a_byte_too_many_is_refused_with_the_numbers() -> None:
    host = room(16, 16)
    exact = need(10, 4, 2)
    assert not place(exact, host, ONE_NODE, False)
    message = refusal(need(10 + 1e-8, 4, 2), host, ONE_NODE, False)
    assert message.startswith(
        "the model takes 16.00 GiB of memory (experts 10.00 GiB, other weights 4.00 GiB, KV cache"
        " 2.00 GiB), 16.00 GiB are free: "
    )


def test_settings_that_make_it_fit() -> None:
    host = room(16, 16)
    assert refusal(need(20, 1, 0, int4=6), host, ONE_NODE, False).endswith(
        "are free: LVLLM_MOE_USE_WEIGHT=INT4 makes it fit"
    )
    # 5 GiB are left for the KV cache of one rank, or 2.5 GiB each for two.
    message = refusal(need(10, 1, 8), host, ONE_NODE, False)
    assert message.endswith(f": kv-cache-memory-bytes={5 * GIB} or less makes it fit")
    ranks = [Rank({0: 1}, 0), Rank({0: 1}, 0)]
    message = refusal(need(10, 1, 8), host, ranks, False)
    assert message.endswith(f": kv-cache-memory-bytes={5 * GIB // 2} or less makes it fit")
    message = refusal(need(10, 1, 8, int4=3), host, ONE_NODE, False)
    assert "LVLLM_MOE_USE_WEIGHT=INT4 or kv-cache-memory-bytes=" in message


def test_when_nothing_helps() -> None:
    message = refusal(need(100, 10, 8, int4=30), room(16, 16), ONE_NODE, False)
    assert message.endswith(
        "no setting makes it fit; with LVLLM_MOE_USE_WEIGHT=INT4 and no KV cache it takes 40.00 GiB"
    )
    # Experts that already have 4 bits do not become smaller.
    assert "INT4 makes" not in refusal(need(20, int4=20), room(16, 16), ONE_NODE, False)


def test_pages_are_interleaved_if_a_node_is_too_small() -> None:
    """Each node would hold 15 GiB of the experts' 30 GiB, but one has only 12 GiB free."""
    model, host = need(30, 2), room(52, 40, 12)
    message = refusal(model, host, TWO_NODES, False)
    assert message == (
        "NUMA node 1 would hold 15.00 GiB of the model (experts 15.00 GiB, other weights 0.00 GiB),"
        " 12.00 GiB are free on it: LVLLM_ENABLE_NUMA_INTERLEAVE=1 makes it fit"
    )
    assert place(model, host, TWO_NODES, True)
    # Round-robin skips a node that is full: 12 GiB lie on that node, and 18 GiB on the other.
    shares = node_shares(model, TWO_NODES, host.nodes, True)
    assert [share.experts // GIB for share in shares.values()] == [18, 12]


def test_one_node_computes_and_others_have_the_memory() -> None:
    """All workers are on node 0. The second and the third node have only memory."""
    host = room(60, 20, 20, 20)
    ranks = [Rank({0: 8}, 0)]
    assert "INTERLEAVE=1 makes it fit" in refusal(need(30), host, ranks, False)
    assert place(need(30), host, ranks, True)
    assert not place(need(18), host, ranks, True), "what fits on its node stays there"
    # With interleaving, node 0 holds a third of the experts and all other weights.
    assert place(need(30, 10), host, ranks, True)
    message = refusal(need(30, 9, 3), host, ranks, True)
    assert message.startswith("NUMA node 0 would hold 22.00 GiB")
    assert message.endswith(f": kv-cache-memory-bytes={GIB} or less makes it fit")


def test_ranks_share_a_host() -> None:
    ranks = [Rank({0: 3}, 0), Rank({1: 2, 2: 1}, 1)]
    free = room(300, 100, 100, 100).nodes
    shares = node_shares(need(60, 20, 10), ranks, free, False)
    assert shares == {
        0: need(30, 10, 5, int4=0),
        1: need(20, 10, 5, int4=0),
        2: need(10, 0, 0, int4=0),
    }
    interleaved = node_shares(need(60, 20, 10), ranks, free, True)
    assert [share.experts for share in interleaved.values()] == [20 * GIB] * 3


def test_free_memory_of_nodes(tmp_path: Path) -> None:
    """Page cache counts as free, and pages of tmpfs do not. A node without memory is left out."""
    for node, fields in (
        (0, {"MemTotal": 900, "MemFree": 100, "Active(file)": 20, "Inactive(file)": 30,
             "Shmem": 500, "SReclaimable": 7}),
        (1, {"MemTotal": 0, "MemFree": 0}),
        (10, {"MemTotal": 64, "MemFree": 64}),
    ):  # fmt: skip
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        lines = [f"Node {node} {name}:  {kib} kB" for name, kib in fields.items()]
        (folder / "meminfo").write_text("\n".join([*lines, f"Node {node} HugePages_Total: 0"]))
    assert free_on_nodes(tmp_path, range(64)) == {0: 157 * 1024, 10: 64 * 1024}
    assert free_on_nodes(tmp_path, [1, 10]) == {10: 64 * 1024}
    assert free_on_nodes(tmp_path / "none", range(64)) == {}


def test_this_machine_has_what_its_nodes_have() -> None:
    free = free_on_nodes()
    if free:
        machine = meminfo(Path("/proc/meminfo").read_text())
        # Memory that a hypervisor adds to a running machine may belong to no node.
        on_nodes = sum(
            meminfo(file.read_text())["MemTotal"]
            for file in Path("/sys/devices/system/node").glob("node*/meminfo")
        )
        available = machine["MemAvailable"] - (machine["MemTotal"] - on_nodes)
        # The kernel keeps a reserve, and other processes allocate meanwhile.
        assert sum(free.values()) == pytest.approx(available, rel=0.15, abs=2 * GIB)


def meminfo(text: str) -> dict[str, int]:
    """The sizes in the kernel's text about the machine or a node, in bytes."""
    return {name: int(kib) << 10 for name, kib in re.findall(r"(\w+): +(\d+) kB", text)}


def test_a_model_without_files_is_counted_when_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(1 << 20, 1 << 12, bias=False, device="meta")  # 16 GiB
    monkeypatch.setattr(bank, "allocated_bytes", lambda: 2 * GIB)
    monkeypatch.setattr(memory_plan, "resident_bytes", lambda: 1 * GIB)
    monkeypatch.setattr(bank, "available_bytes", lambda: 17 * GIB)
    memory_plan.check_built(model, 0)
    monkeypatch.setattr(bank, "available_bytes", lambda: 16 * GIB)
    with pytest.raises(MemoryError) as error:
        memory_plan.check_built(model, GIB // 2)
    assert str(error.value) == (
        "the model takes 18.50 GiB of memory (experts 2.00 GiB, other weights 16.00 GiB, KV cache"
        " 0.50 GiB), 17.00 GiB are free"
    )

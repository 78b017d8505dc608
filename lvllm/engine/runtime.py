"""The engine of this process, which all layers share: configuration, machine and NaN watch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lvllm.engine.arithmetic import Arithmetic
from lvllm.engine.ops import raw_ops
from lvllm.engine.weight_formats import check_choice

__all__ = [
    "ISAS",
    "Binding",
    "EngineInfo",
    "Node",
    "Topology",
    "configure",
    "info",
    "on_isa",
    "topology",
    "watch",
]

_configured: dict[str, Any] = {}
"""The arguments of the last `configure`."""

Binding = Literal["CPU_CORE", "NUMA_NODE"]

ISAS = (
    "portable", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_vbmi", "avx512_bf16", "amx"
)  # fmt: skip
"""Instruction sets that the engine has kernels for, the plainest first."""


@dataclass(frozen=True)
class Node:
    """A NUMA node as this process may use it."""

    id: int
    """The node's number in the kernel."""
    cores: tuple[tuple[int, ...], ...]
    """The CPUs of each physical core, first the main one, then its SMT siblings. A node without
    cores has only memory."""
    memory_bytes: int

    @property
    def cpus(self) -> tuple[int, ...]:
        return tuple(sorted(cpu for core in self.cores for cpu in core))


@dataclass(frozen=True)
class Topology:
    """The part of the machine that the cgroup's cpuset and the process's CPU affinity allow."""

    nodes: tuple[Node, ...]

    @property
    def physical_cores(self) -> int:
        return sum(len(node.cores) for node in self.nodes)

    @property
    def cpus(self) -> tuple[int, ...]:
        return tuple(sorted(cpu for node in self.nodes for cpu in node.cpus))


@dataclass(frozen=True)
class EngineInfo:
    """What the engine runs on."""

    isa: str
    """One of `ISAS`: the one that was asked for, or else the last one that the CPU has. In the
    latter case some formats may take another one, which `arithmetic_of` names."""
    rates: Mapping[Arithmetic, float]
    """How many weights a core multiplies by an activation each second, in the arithmetics among
    which the engine chose. Empty if it was told an instruction set."""
    threads: int
    """Workers, the calling thread included."""
    nodes: tuple[int, ...]
    """The NUMA nodes in use, by the kernel's numbers."""
    cpus: tuple[tuple[int, ...], ...]
    """Where each worker may run. The calling thread is one of the workers, but it is not pinned: it
    counts as the worker of the core that it happens to be on."""
    worker_nodes: tuple[int, ...]
    """The node of each worker."""
    huge_pages: bool
    """Whether the kernel gives transparent huge pages to memory that asks for them."""
    binding: str
    power_saving: bool
    own_cores: bool


def configure(
    threads: int | None = None,
    binding: str = "CPU_CORE",
    power_saving: bool = False,
    own_cores: bool = False,
    cpus: Sequence[int] | None = None,
    topology: str | None = None,
    isa: str | None = None,
    interleave: bool = False,
    shared: bool = False,
) -> None:
    """Set up the engine of this process. Without this call, the first use takes the defaults.

    A later call with other values waits until the engine is idle, and starts the threads anew.
    Weights stay in the memory in which they were allocated, so call this before `bank.allocate`.

    Args:
        threads: the number of workers, the calling thread included; by default one for each
            physical core.
        binding: "CPU_CORE" pins each worker to a core, "NUMA_NODE" to the cores of its node.
        power_saving: workers sleep as soon as a call ends, instead of spinning for 50 us first.
        own_cores: nothing else needs the workers' cores between two calls, as beside a GPU. Workers
            then spin for four times the average time between calls instead of 50 us, but for 2 ms
            at most. `power_saving` prevails.
        cpus: run on these CPUs only; by default on all that the process may use.
        topology: a made-up machine for tests, such as "2 nodes x 3 cores x 2 threads" or, with
            uneven nodes, "2 nodes x 3,1 cores x 2 threads". Then threads are not pinned, and memory
            is not placed on nodes.
        isa: one of `ISAS`; by default the value of the variable LK_ISA, or for each format the
            one that is fastest on this CPU.
        interleave: `bank.allocate` spreads pages over all NUMA nodes round-robin, instead of
            placing each row's pages on the node that computes the row.
        shared: `bank.allocate` gives memory that other processes can map, in huge pages from
            Linux 6.1 on.

    Raises:
        ValueError: for an argument that is not allowed. The text names the argument, its value and
            what is allowed.
    """
    given = dict(locals())
    check_choice("binding", binding, get_args(Binding))
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}, must be at least 1")
    if cpus is not None and len(cpus) == 0:
        raise ValueError("cpus is empty, must name at least one CPU")
    raw_ops.configure(
        threads or 0,
        binding,
        power_saving,
        own_cores,
        list(cpus or ()),
        topology or "",
        isa or "",
        interleave,
        shared,
    )
    _configured.clear()
    _configured.update(given)


@contextmanager
def on_isa(isa: str) -> Iterator[None]:
    """Run the block on an instruction set, with the engine as it is otherwise.

    Raises ValueError for an instruction set that this CPU lacks.
    """
    before = dict(_configured)
    configure(**before | {"isa": isa})
    try:
        yield
    finally:
        configure(**before)


def watch(log: torch.Tensor | None) -> None:
    """From now on, note in `log` which rows of the engine's output hold NaN or infinity.

    Args:
        log: int64 [rows + 2, 3] in host memory, also shared memory, and zero at first; None ends
            the watch. log[0, 0] counts the rows noted. log[1 + r] is (handle, reason, expert) of
            the first layer in which row r was not finite; the handle 0 stands for none.
            log[rows + 1] is for all rows from `rows` on. The reason is 0 if the input was not
            finite, 1 if the router's weight for the expert was not, 2 if the expert's output was
            not, and 3 if the sum of all experts was not finite in x's dtype. The expert is -1 for
            the reasons 0 and 3.

    Raises:
        ValueError: for another dtype or shape.
    """
    raw_ops.watch(log)


def info() -> EngineInfo:
    """What the engine runs on. This starts the engine if it does not run yet."""
    raw = json.loads(raw_ops.info())
    workers = raw["workers"]
    return EngineInfo(
        isa=raw["isa"],
        rates={Arithmetic(r["isa"], r["arithmetic"]): r["weights"] for r in raw["rates"]},
        threads=len(workers),
        nodes=tuple(raw["nodes"]),
        cpus=tuple(tuple(worker["cpus"]) for worker in workers),
        worker_nodes=tuple(worker["node"] for worker in workers),
        huge_pages=_transparent_huge_pages(),
        binding=raw["binding"],
        power_saving=raw["power_saving"],
        own_cores=raw["own_cores"],
    )


def topology() -> Topology:
    """The machine that the engine sees: nodes, cores, SMT siblings, memory. Starts no thread."""
    return Topology(
        tuple(
            Node(node["id"], tuple(tuple(core) for core in node["cores"]), node["memory_bytes"])
            for node in json.loads(raw_ops.topology())
        )
    )


def _transparent_huge_pages() -> bool:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False
    return "[never]" not in text

"""Rules about memory: the kernel's settings, limits, NUMA nodes and swap."""

from collections.abc import Iterator

from lvllm.machine.report import Finding, MachineReport
from lvllm.machine.room import queue_bytes
from lvllm.units import MIB, amount, gib

__all__ = ["RULES"]

SWAPPED_BYTES = 256 * MIB
"""Below this, swap holds what idle programs have not touched since their start."""
EQUAL_FREE = 0.5
"""Experts are divided evenly, so that a node with less than this part of the free memory of another
one decides how large a model can be."""


def small_shared_memory(report: MachineReport) -> Iterator[Finding]:
    free, needed = report.limits.shared_memory_bytes, queue_bytes()
    if free is not None and free < needed:
        yield Finding(
            what=f"/dev/shm has {amount(free)} free",
            why=f"vLLM's processes need {amount(needed)} there to talk to each other, and no"
            " server starts",
            command="mount -o remount,size=1g /dev/shm, or delete files there (Docker:"
            " --shm-size=1g)",
        )


def numa_balancing(report: MachineReport) -> Iterator[Finding]:
    if report.kernel.numa_balancing and len(report.nodes) > 1:
        yield Finding(
            what=f"kernel.numa_balancing is on, with {len(report.nodes)} NUMA nodes",
            why="the kernel unmaps and moves pages of weights that already lie where they belong",
            command="sysctl -w kernel.numa_balancing=0",
        )


def no_huge_pages(report: MachineReport) -> Iterator[Finding]:
    if report.kernel.transparent_huge_pages == "never":
        yield Finding(
            what="transparent huge pages are off",
            why="weights lie in pages of 4 KiB, and reading them is slower",
            command="echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )


def memory_limit(report: MachineReport) -> Iterator[Finding]:
    limit, memory = report.limits.memory_limit_bytes, report.kernel.memory_bytes
    if isinstance(limit, int) and memory and limit < memory // 2:
        yield Finding(
            what=f"the cgroup may use {gib(limit)} of the machine's {gib(memory)}",
            why="experts that do not fit are refused, though the machine has room",
            command=f"docker update --memory {memory * 9 // 10 // MIB}m --memory-swap -1 CONTAINER"
            " (systemd: MemoryMax=90%)",
        )


def nodes_without_memory(report: MachineReport) -> Iterator[Finding]:
    for node in report.nodes:
        if node.memory_bytes == 0 and node.cpus:
            yield Finding(
                what=f"NUMA node {node.id} has CPUs and no memory",
                why="its cores read all weights from other nodes",
                command="dmidecode --type memory (is each socket filled?), or keep the engine off"
                f" the node: numactl --cpunodebind={_others(report, node.id)} vllm serve ...",
            )


def _others(report: MachineReport, left_out: int) -> str:
    others = [n.id for n in report.nodes if n.id != left_out and n.cpus and n.memory_bytes]
    return ",".join(map(str, others)) or "NODES"


def memory_left_out(report: MachineReport) -> Iterator[Finding]:
    allowed = report.limits.allowed_memory_nodes
    nodes = [node.id for node in report.nodes if node.memory_bytes]
    left_out = [id for id in nodes if allowed and id not in allowed]
    if left_out:
        yield Finding(
            what=f"this process may use no memory of NUMA node {', '.join(map(str, left_out))}",
            why="models are refused that the machine has room for",
            command=f"docker update --cpuset-mems {','.join(map(str, nodes))} CONTAINER, or start"
            " without numactl",
        )


def unequal_free_memory(report: MachineReport) -> Iterator[Finding]:
    free = {
        node.id: node.free_bytes
        for node in report.nodes
        if node.cpus and node.memory_bytes and node.free_bytes is not None
    }
    if len(free) < 2:
        return
    least, most = min(free, key=free.__getitem__), max(free, key=free.__getitem__)
    if free[least] < EQUAL_FREE * free[most]:
        yield Finding(
            what=f"NUMA node {least} has {gib(free[least])} free, and node {most} has"
            f" {gib(free[most])}",
            why="experts are divided evenly, so the fullest node limits the model",
            command="LVLLM_ENABLE_NUMA_INTERLEAVE=1, or end what fills the node (numastat -m; free"
            " huge pages: sysctl -w vm.nr_hugepages=0)",
        )


def swap_in_use(report: MachineReport) -> Iterator[Finding]:
    used = report.kernel.swap_used_bytes
    if used is not None and used > SWAPPED_BYTES:
        yield Finding(
            what=f"{gib(used)} of memory are in swap",
            why="a token waits for the disk when it needs weights from there",
            command="swapoff -a",
        )


RULES = (
    small_shared_memory,
    memory_limit,
    memory_left_out,
    swap_in_use,
    numa_balancing,
    no_huge_pages,
    nodes_without_memory,
    unequal_free_memory,
)

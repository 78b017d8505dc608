"""Which logical CPUs each rank of this host computes on."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from lvllm import engine

# A machine is a list of NUMA nodes, a node a list of physical cores, a core a list of logical CPUs.
Core = Sequence[int]
Machine = Sequence[Sequence[Core]]

# The API server, the scheduler and the operating system need cores, too. On a machine of four cores
# or fewer, giving them a core of their own costs more than sharing one does.
SPARE_CORES = 4


def this_machine() -> Machine:
    """The CPUs that this process may use."""
    return [node.cores for node in engine.topology().nodes]


def default_threads(machine: Machine, ranks: int, quota: float | None = None) -> int:
    """The number of engine threads of each rank if LK_THREADS is not set; at least 1.

    Args:
        machine: the CPUs that the ranks may use.
        ranks: the ranks that share them.
        quota: the CPUs whose time the cgroup gets; None: no limit. The kernel stops all threads of
            a cgroup whose time is used up, so more cores than that are of no use.
    """
    cores = sum(len(node) for node in machine)
    if quota is not None:
        cores = min(cores, int(quota))
    usable = cores if cores <= SPARE_CORES else cores - SPARE_CORES
    return max(1, usable // ranks)


def divide(machine: Machine, ranks: int) -> list[Machine]:
    """Divide the machine among ranks: each gets whole nodes, or a piece of a node.

    Ranks get whole nodes where there are enough nodes, so that no rank reads the memory of
    another rank's node. Otherwise the ranks that share a node divide its cores.
    """
    nodes = [node for node in machine if node]
    if len(nodes) >= ranks:
        bounds = [rank * len(nodes) // ranks for rank in range(ranks + 1)]
        return [nodes[begin:end] for begin, end in pairwise(bounds)]
    shares: list[Machine] = []
    for n, node in enumerate(nodes):
        on_node = (n + 1) * ranks // len(nodes) - n * ranks // len(nodes)
        if len(node) >= on_node:
            bounds = [rank * len(node) // on_node for rank in range(on_node + 1)]
            pieces = [node[begin:end] for begin, end in pairwise(bounds)]
        else:  # There are more ranks than cores, so ranks share cores.
            pieces = [[node[r % len(node)]] for r in range(on_node)]
        shares.extend([piece] for piece in pieces)
    return shares


def assign(shares: Sequence[Machine], distance: Callable[[int, Machine], int]) -> list[Machine]:
    """Reorder `shares` so that each rank's share is near its GPU.

    The shares themselves do not change. So if all GPUs are at one node, the cores of the other
    nodes are used all the same. distance(rank, share) says how far the rank's GPU is from a share.
    The nearest pair is matched first.
    """
    ranks = range(len(shares))
    pairs = sorted((distance(rank, shares[n]), rank, n) for rank in ranks for n in ranks)
    chosen: dict[int, int] = {}
    for _, rank, n in pairs:
        if rank not in chosen and n not in chosen.values():
            chosen[rank] = n
    return [shares[chosen[rank]] for rank in ranks]


def choose(share: Machine, threads: int) -> list[int]:
    """Choose `threads` logical CPUs of a rank's `share`, as many on each node.

    The rows of weights are divided evenly among the nodes, so the nodes should be equally strong.
    The second logical CPU of a core is taken only when all cores have one thread: it shares the
    core's vector units and its path to memory.
    """
    queues = [
        [core[level] for level in range(max(map(len, node))) for core in node if level < len(core)]
        for node in share
    ]
    chosen: list[list[int]] = [[] for _ in queues]
    taken = 0
    for place in range(max(map(len, queues))):
        for node, queue in enumerate(queues):
            if place < len(queue) and taken < threads:
                chosen[node].append(queue[place])
                taken += 1
    return [cpu for node in chosen for cpu in node]


def logical_cpus(share: Machine) -> int:
    """The largest thread count that `choose` can serve."""
    return sum(len(core) for node in share for core in node)


def spares_a_core(machine: Machine, taken: Sequence[Sequence[int]]) -> bool:
    """Whether the ranks, whose logical CPUs are `taken`, leave a whole core to other processes."""
    used = {cpu for rank in taken for cpu in rank}
    return any(used.isdisjoint(core) for node in machine for core in node)

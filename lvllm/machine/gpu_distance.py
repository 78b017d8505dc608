"""The distances between this machine's CPUs and its GPUs, from the kernel's NUMA distances."""

import json
from collections.abc import Callable
from pathlib import Path

from lvllm import engine
from lvllm.engine import raw_ops
from lvllm.machine.cpus import Machine

__all__ = ["between_nodes", "of_gpus"]

UNKNOWN = 1 << 16
"""A distance beyond all known ones. A rank with this distance gets the share that others leave."""


def of_gpus() -> Callable[[int, Machine], int] | None:
    """A function (local rank, part of the machine) -> distance from the rank's GPU to the part.

    None where vLLM runs on no GPU. The distance is `UNKNOWN` where vLLM does not know the GPU's
    NUMA node.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    node_of = {cpu: node.id for node in engine.topology().nodes for cpu in node.cpus}
    distances = between_nodes()

    def distance(rank: int, share: Machine) -> int:
        try:
            # vLLM asks NVML, which does not initialise CUDA.
            home = current_platform.get_device_numa_node(rank)
        except Exception:  # For example, fewer GPUs than ranks, which vLLM reports later.
            home = None
        if home is None:
            return UNKNOWN
        nodes = {node_of[core[0]] for node in share for core in node}
        return sum(distances.get((home, node), UNKNOWN) for node in nodes)

    return distance


def between_nodes(sysfs: Path = Path("/sys")) -> dict[tuple[int, int], int]:
    """The kernel's distance between each pair of NUMA nodes; 10 is the distance to itself."""
    nodes = json.loads(raw_ops.numa_memory(str(sysfs)))
    # A node's list has one distance for each of the nodes, or none if the kernel does not say.
    return {
        (one["id"], other["id"]): distance
        for one in nodes
        for other, distance in zip(nodes, one["distances"], strict=False)
    }

"""How far parts of this machine are from its GPUs, by the kernel's distances of NUMA nodes."""

from collections.abc import Callable
from pathlib import Path

from lvllm import engine
from lvllm.machine.cpus import Machine

__all__ = ["between_nodes", "of_gpus"]

UNKNOWN = 1 << 16
"""Farther than all that is known: such a rank takes what others leave."""


def of_gpus() -> Callable[[int, Machine], int] | None:
    """The distance of a local rank's GPU from a part of the machine; None where vLLM has no GPU, or
    does not know at which node it is.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    node_of = {cpu: node.id for node in engine.topology().nodes for cpu in node.cpus}
    distances = between_nodes()

    def distance(rank: int, share: Machine) -> int:
        try:
            home = current_platform.get_device_numa_node(rank)  # asks NVML, which starts no CUDA
        except Exception:  # fewer GPUs than ranks, say: vLLM tells
            home = None
        if home is None:
            return UNKNOWN
        nodes = {node_of[core[0]] for node in share for core in node}
        return sum(distances.get((home, node), UNKNOWN) for node in nodes)

    return distance


def between_nodes(root: Path = Path("/sys/devices/system/node")) -> dict[tuple[int, int], int]:
    """The kernel's distance of each pair of NUMA nodes: 10 is a node from itself."""
    files = {
        int(file.parent.name.removeprefix("node")): file for file in root.glob("node*/distance")
    }
    # A row has a number for each node that is there, by rising node.
    return {
        (one, other): int(number)
        for one, file in files.items()
        for other, number in zip(sorted(files), file.read_text().split(), strict=True)
    }

"""Machines that are made up of files below a folder, as the kernel would show them."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def write(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write files below `root` and return it."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def cpu(number: int, siblings: str, package: int = 0) -> dict[str, str]:
    """The files of a logical CPU."""
    folder = f"sys/devices/system/cpu/cpu{number}/topology"
    return {
        f"{folder}/core_cpus_list": f"{siblings}\n",
        f"{folder}/physical_package_id": f"{package}\n",
    }


def node(
    id: int, cpus: str, gib: int, free_gib: int, distances: Sequence[int] = ()
) -> dict[str, str]:
    """The files of a NUMA node."""
    folder = f"sys/devices/system/node/node{id}"
    return {
        f"{folder}/cpulist": f"{cpus}\n",
        f"{folder}/distance": " ".join(map(str, distances)) + "\n",
        f"{folder}/meminfo": f"Node {id} MemTotal: {gib << 20} kB\n"
        f"Node {id} MemFree: {free_gib << 20} kB\n"
        f"Node {id} Active(file): 1024 kB\n",
    }

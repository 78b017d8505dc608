"""The kernel's memory, its NUMA nodes, and its settings."""

import re
from pathlib import Path

from lvllm.machine.facts.files import id_list, number, numbered, sizes, text, word
from lvllm.machine.report import HugePages, Kernel, Node

__all__ = ["nodes", "read"]


def read(root: Path = Path("/")) -> Kernel:
    """Settings and memory by the files below `root`."""
    settings = root / "proc/sys"
    memory = sizes(root / "proc/meminfo")
    load = word(root / "proc/loadavg") or ""
    swap, swap_free = memory.get("SwapTotal"), memory.get("SwapFree")
    balancing = number(word(settings / "kernel/numa_balancing"))
    mode = re.search(
        r"\[(\w+)\]", text(root / "sys/kernel/mm/transparent_hugepage/enabled") or "", re.ASCII
    )
    return Kernel(
        version=word(settings / "kernel/osrelease"),
        load_average=float(load) if re.fullmatch(r"[0-9]{1,9}\.[0-9]+", load) else None,
        memory_bytes=memory.get("MemTotal"),
        available_bytes=memory.get("MemAvailable"),
        swap_bytes=swap,
        swap_used_bytes=None if swap is None or swap_free is None else max(0, swap - swap_free),
        transparent_huge_pages=mode[1] if mode else None,
        huge_pages=_huge_pages(root / "sys/kernel/mm/hugepages"),
        # Bit 0 moves pages to the threads that use them. Bit 1 moves pages between kinds of memory.
        numa_balancing=None if balancing is None else balancing & 1 == 1,
        overcommit_memory=number(word(settings / "vm/overcommit_memory")),
    )


def _huge_pages(folder: Path) -> list[HugePages]:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except (OSError, ValueError):
        return []
    found = []
    for name in names:
        match = re.fullmatch(r"hugepages-([0-9]{1,12})kB", name)
        if match:
            found.append(
                HugePages(
                    page_bytes=int(match[1]) << 10,
                    total=number(word(folder / name / "nr_hugepages")),
                    free=number(word(folder / name / "free_hugepages")),
                )
            )
    return sorted(found, key=lambda pages: pages.page_bytes)


def nodes(root: Path = Path("/")) -> list[Node]:
    """The NUMA nodes by rising number; empty without NUMA information."""
    folders = numbered(root / "sys/devices/system/node", "node")
    found = []
    for id, folder in folders.items():
        memory = sizes(folder / "meminfo")
        # A node has no MemAvailable.
        free = [memory.get(k) for k in ("Active(file)", "Inactive(file)", "SReclaimable")]
        distances = [number(item) for item in (text(folder / "distance") or "").split()]
        known = len(distances) == len(folders)
        found.append(
            Node(
                id=id,
                cpus=id_list(text(folder / "cpulist")),
                memory_bytes=memory.get("MemTotal"),
                free_bytes=memory["MemFree"] + sum(f or 0 for f in free)
                if "MemFree" in memory
                else None,
                # The kernel's rows have a number for each node that is there, and none for others.
                distances={
                    other: distance
                    for other, distance in zip(folders, distances, strict=False)
                    if known and distance is not None
                },
            )
        )
    return found

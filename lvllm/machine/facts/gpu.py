"""The NVIDIA GPUs, by nvidia-smi. This starts no CUDA, which would take memory of the GPU."""

import csv
import re
from pathlib import Path

from lvllm.machine.facts.commands import Run
from lvllm.machine.facts.files import number, word
from lvllm.machine.report import Gpu

__all__ = ["pcie_generation", "read"]

FIELDS = (
    "index", "uuid", "name", "memory.total", "memory.used", "driver_version", "pci.bus_id",
    "pcie.link.gen.current", "pcie.link.gen.max", "pcie.link.width.current", "pcie.link.width.max",
)  # fmt: skip


def read(run: Run, root: Path = Path("/")) -> tuple[list[Gpu], str | None]:
    """The GPUs, and why they are unknown if nvidia-smi does not tell."""
    said = run(_query(*FIELDS))
    if said is None:
        return [], None
    rows = [row for row in _rows(said) if len(row) == len(FIELDS) and number(row[0]) is not None]
    if not rows:
        reason = " ".join(said.split())[:200]
        # Not every machine with the program has a GPU.
        return [], None if not reason or "No devices" in reason else f"nvidia-smi says: {reason}"
    cuda = re.search(r"CUDA Version:\s*([0-9.]+)", run(["nvidia-smi"]) or "")
    gpus = []
    for row in rows:
        value = dict(zip(FIELDS, row, strict=True))
        gpus.append(
            Gpu(
                index=number(value["index"]),
                uuid=value["uuid"],
                name=value["name"],
                memory_bytes=_mib(value["memory.total"]),
                memory_used_bytes=_mib(value["memory.used"]),
                driver=value["driver_version"],
                cuda=cuda[1] if cuda else None,
                bus=value["pci.bus_id"],
                pcie_generation=number(value["pcie.link.gen.current"]),
                pcie_generation_most=number(value["pcie.link.gen.max"]),
                pcie_width=number(value["pcie.link.width.current"]),
                pcie_width_most=number(value["pcie.link.width.max"]),
                node=_node(root, value["pci.bus_id"]),
            )
        )
    return gpus, None


def pcie_generation(run: Run, index: int) -> int | None:
    """The generation at which the link of a GPU runs at this moment."""
    return number(run([*_query("pcie.link.gen.current"), f"--id={index}"]))


def _query(*fields: str) -> list[str]:
    return ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def _rows(said: str) -> list[list[str]]:
    try:
        return [[cell.strip() for cell in row] for row in csv.reader(said.splitlines())]
    except csv.Error:
        return []


def _mib(written: str) -> int | None:
    size = number(written)
    return None if size is None else size << 20


def _node(root: Path, bus: str) -> int | None:
    """The kernel writes -1 where the firmware does not say. It names 4 digits of the domain."""
    match = re.fullmatch(r"[0-9a-f]*([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f])", bus.lower())
    return number(word(root / f"sys/bus/pci/devices/{match[1]}/numa_node")) if match else None

"""GPUs, as made-up answers of nvidia-smi describe them."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from lvllm.machine.facts import gpu
from lvllm.machine.facts.commands import Run
from lvllm.machine.report import Gpu
from tests.machine import made_up

ROW = (
    "0, GPU-1, NVIDIA GeForce RTX 4090, 24564, 512, 550.54.15, 00000000:3B:00.0, 1, 4, 8, 16\n"
    "1, GPU-2, NVIDIA X, [N/A], [N/A], 550.54.15, 00000000:D8:00.0, [N/A], 4, [N/A], 16\n"
)


def smi(rows: str, header: str = "") -> Run:
    def run(command: Sequence[str]) -> str | None:
        return rows if len(command) > 1 else header

    return run


def test_two_gpus(tmp_path: Path) -> None:
    root = made_up.write(
        tmp_path,
        {
            "sys/bus/pci/devices/0000:3b:00.0/numa_node": "1\n",
            "sys/bus/pci/devices/0000:d8:00.0/numa_node": "-1\n",
        },
    )
    gpus, error = gpu.read(smi(ROW, "| Driver Version: 550  CUDA Version: 12.4 |"), root)
    assert error is None
    assert gpus[0] == Gpu(
        index=0,
        uuid="GPU-1",
        name="NVIDIA GeForce RTX 4090",
        memory_bytes=24564 << 20,
        memory_used_bytes=512 << 20,
        driver="550.54.15",
        cuda="12.4",
        bus="00000000:3B:00.0",
        pcie_generation=1,
        pcie_generation_most=4,
        pcie_width=8,
        pcie_width_most=16,
        node=1,
    )
    assert (gpus[1].memory_bytes, gpus[1].pcie_width, gpus[1].node) == (None, None, None)


@pytest.mark.parametrize("said", [None, "", "No devices were found"])
def test_no_gpu(tmp_path: Path, said: str | None) -> None:
    assert gpu.read(lambda command: said, tmp_path) == ([], None)


def test_a_driver_that_fails(tmp_path: Path) -> None:
    said = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550"
    gpus, error = gpu.read(smi(said), tmp_path)
    assert gpus == []
    assert error is not None
    assert error.startswith("nvidia-smi says: Failed to initialize NVML")
    assert "\n" not in error


def test_generation_of_one_gpu() -> None:
    asked: list[Sequence[str]] = []

    def run(command: Sequence[str]) -> str:
        asked.append(command)
        return "4"

    assert gpu.pcie_generation(run, 1) == 4
    assert "--id=1" in asked[0]

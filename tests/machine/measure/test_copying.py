"""Copies to GPUs, as far as that goes without one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lvllm.machine.measure import copying
from lvllm.machine.measure.reading import Reader
from lvllm.machine.report import Gpu


def nothing(command: object) -> None:
    """No program is installed."""


def reader() -> Reader:
    return Reader([(0, [0])], {0: torch.ones(8)})


def test_a_pytorch_without_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="sees no GPU"):
        copying.measure(reader(), [Gpu(index=0, uuid="GPU-a")], nothing)


def test_gpus_are_matched_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA counts the GPUs in another order than nvidia-smi, and one of three is hidden."""
    measured: list[tuple[int, int]] = []

    def copies(reader: Reader, host: torch.Tensor, device: int, index: int, run: Any) -> None:
        measured.append((device, index))

    monkeypatch.setattr(copying, "COPY_BYTES", 8)
    monkeypatch.setattr(copying, "_copies", copies)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda host: host)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    uuids = SimpleNamespace(uuid="c"), SimpleNamespace(uuid="a")
    monkeypatch.setattr(torch.cuda, "get_device_properties", uuids.__getitem__)
    gpus = [Gpu(index=n, uuid=f"GPU-{name}") for n, name in enumerate("abc")]
    copying.measure(reader(), gpus, nothing)
    assert measured == [(1, 0), (0, 2)]

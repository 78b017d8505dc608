"""The CPU worker, without an engine."""

from typing import Any

import pytest
from vllm.v1.worker.cpu_worker import CPUWorker

from lvllm.errors import LvllmError
from lvllm.faults import process
from lvllm.worker.cpu import HybridCPUWorker


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("Available memory on node 0 (1/2 GiB)\nis less than desired")

    monkeypatch.delenv(process._VARIABLE, raising=False)
    monkeypatch.setattr(CPUWorker, "__init__", refuse)
    with pytest.raises(LvllmError, match=r"^Available memory on node 0 .1/2 GiB. is less than"):
        HybridCPUWorker()

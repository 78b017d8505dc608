"""Tests that the watchdog learns where a step waits for another stage of a pipeline."""

from typing import Any

import pytest
import torch
from vllm.config import ParallelConfig
from vllm.v1.worker.gpu_worker import AsyncIntermediateTensors, Worker

from lvllm import gpu
from lvllm.patches import patches, stages
from lvllm.worker import gpu as worker
from lvllm.worker.gpu import HybridGPUWorker


class Handle:
    """A transfer that is under way."""

    def __init__(self, said: list[str]) -> None:
        self._said = said

    def wait(self) -> None:
        self._said.append("waited")


def test_what_is_received_is_marked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(gpu, "mark_others", lambda: said.append("marked"))
    replaced = stages.mark_what_is_received.make(AsyncIntermediateTensors.wait_for_comm)
    monkeypatch.setattr(AsyncIntermediateTensors, "wait_for_comm", replaced)
    handles: list[Any] = [Handle(said), Handle(said)]
    received = AsyncIntermediateTensors({"hidden_states": torch.ones(1)}, comm_handles=handles)
    assert not said
    for _ in range(2):
        assert received.tensors["hidden_states"].all()
    assert said == ["waited", "waited", "marked"]


def test_what_is_sent_is_marked_before_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(worker, "mark_others", lambda: said.append("marked"))
    monkeypatch.setattr(worker, "mark_step", lambda: None)
    stage: Any = object.__new__(HybridGPUWorker)
    stage.rank, stage.parallel_config = 0, ParallelConfig()

    def execute(self: Any, _: object) -> None:
        assert not getattr(self, "_pp_send_work", [])
        said.append("step")
        self._pp_send_work = [Handle(said)]

    monkeypatch.setattr(Worker, "execute_model", execute)
    for _ in range(2):
        stage.execute_model(None)
    assert said == ["step", "waited", "marked", "step"]


def test_a_worker_on_a_gpu_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes would import all of vLLM's runner for it."""
    target = "vllm.v1.worker.gpu_worker:AsyncIntermediateTensors.wait_for_comm"
    (declared,) = (patch for patch in patches() if patch.target == target)
    monkeypatch.setattr(
        AsyncIntermediateTensors, "wait_for_comm", AsyncIntermediateTensors.wait_for_comm
    )

    def load(_: object) -> None:
        assert declared.is_installed()
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "load_model", load)
    loading: Any = object.__new__(HybridGPUWorker)
    with pytest.raises(KeyboardInterrupt):
        loading.load_model()

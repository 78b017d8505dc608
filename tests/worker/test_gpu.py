"""Tests the GPU worker without a GPU: its checks for errors, and how it measures memory."""

from random import randrange
from typing import Any

import pytest
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from lvllm.gpu import offloaded_layer
from lvllm.gpu.hybrid import raise_host_call_error
from lvllm.gpu.offload import Offload
from lvllm.gpu.stand_in import StandInAccelerator
from lvllm.worker.gpu import HybridGPUWorker
from tests.random_layers import Random, random_layer


class Later(AsyncModelRunnerOutput):
    """An output that the host waits for. The callback runs by then, and not before."""

    def __init__(self, callback: Any) -> None:
        self._callback = callback

    def get_output(self) -> ModelRunnerOutput:
        self._callback()
        return ModelRunnerOutput(req_ids=[], req_id_to_index={})


@pytest.mark.parametrize("method", ["execute_model", "sample_tokens"])
def test_an_error_in_a_callback_ends_its_step(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(randrange(1 << 30))
    accelerator = StandInAccelerator()
    experts = random_layer(random, "bf16", 4, 64, 64).make()
    one = Offload.announce(7, experts, lambda: Offload(accelerator, tokens=8))
    layer = one.add(7, "layers.7", experts, topk=2)
    wrong: list[bool] = []

    def callback() -> None:
        ids = random.integers(4, 5, 3, 2) if wrong else random.integers(0, 4, 3, 2)
        layer.call(random.normal(3, 64).bfloat16(), ids, torch.ones(3, 2))

    worker: Any = object.__new__(HybridGPUWorker)
    monkeypatch.setattr(Worker, method, lambda *_: Later(callback))
    getattr(worker, method)(None).get_output()
    wrong.append(True)
    output = getattr(worker, method)(None)
    with pytest.raises(RuntimeError, match=r"^layers.7: topk_ids\[0, 0\] is 4, must be"):
        output.get_output()

    def at_once(*_: Any) -> ModelRunnerOutput:
        callback()
        return ModelRunnerOutput(req_ids=[], req_id_to_index={})

    monkeypatch.setattr(Worker, method, at_once)
    with pytest.raises(RuntimeError, match=r"^layers.7: "):
        getattr(worker, method)(None)
    raise_host_call_error()
    accelerator.close()


def test_memory_is_measured_with_concentrated_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    worker: Any = object.__new__(HybridGPUWorker)
    monkeypatch.setattr(
        Worker, "determine_available_memory", lambda _: int(offloaded_layer._concentrated)
    )
    assert worker.determine_available_memory() == 1
    assert not offloaded_layer._concentrated

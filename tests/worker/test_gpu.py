"""Tests the GPU worker without a GPU: its checks for errors, and how it measures memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from random import randrange
from typing import Any, NoReturn

import pytest
import torch
from vllm.config import ParallelConfig
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from lvllm.faults import process
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


def worker_of(rank: int, ranks: int) -> Any:
    """Return one of several tensor-parallel workers, which has no model."""
    worker: Any = object.__new__(HybridGPUWorker)
    worker.rank = rank
    worker.parallel_config = ParallelConfig(tensor_parallel_size=ranks)
    return worker


@contextmanager
def layer_of_four_experts() -> Iterator[Callable[[int], None]]:
    """Give a function that computes a batch of a layer, whose ids begin with this number."""
    random = Random(randrange(1 << 30))
    accelerator = StandInAccelerator()
    experts = random_layer(random, "bf16", 4, 64, 64).make()
    one = Offload.announce(7, experts, lambda: Offload(accelerator, tokens=8))
    layer = one.add(7, "layers.7", experts, topk=2)

    def compute(first: int) -> None:
        ids = random.integers(0, 4, 3, 2)
        ids[0, 0] = first
        layer.call(random.normal(3, 64).bfloat16(), ids, torch.ones(3, 2))

    yield compute
    raise_host_call_error()
    accelerator.close()


@pytest.mark.parametrize("method", ["execute_model", "sample_tokens"])
def test_an_error_in_a_callback_ends_its_step(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of(0, 1)
    with layer_of_four_experts() as compute:
        monkeypatch.setattr(Worker, method, lambda *_: Later(lambda: compute(0)))
        getattr(worker, method)(None).get_output()
        monkeypatch.setattr(Worker, method, lambda *_: Later(lambda: compute(4)))
        output = getattr(worker, method)(None)
        with pytest.raises(RuntimeError, match=r"^layers.7: topk_ids\[0, 0\] is 4, must be"):
            output.get_output()

        def at_once(*_: Any) -> ModelRunnerOutput:
            compute(4)
            return ModelRunnerOutput(req_ids=[], req_id_to_index={})

        monkeypatch.setattr(Worker, method, at_once)
        with pytest.raises(RuntimeError, match=r"^layers.7: "):
            getattr(worker, method)(None)


def test_a_rank_whose_errors_nobody_hears_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes the output of the first rank alone, and nobody waits for that of the second."""

    def end(line: str) -> NoReturn:
        raise SystemExit(line)

    monkeypatch.setattr(process, "end_now", end)
    worker = worker_of(1, 2)
    with layer_of_four_experts() as compute:
        for first in (0, 4):
            monkeypatch.setattr(Worker, "execute_model", lambda *_: Later(partial(compute, first)))  # noqa: B023
            worker.execute_model(None)._output.get_output()
        with pytest.raises(SystemExit, match=r"^rank 1: layers.7: topk_ids\[0, 0\] is 4, must be"):
            worker.execute_model(None)

        def fail(*_: Any) -> NoReturn:
            raise ValueError("the graph is gone")

        monkeypatch.setattr(Worker, "execute_model", fail)
        with pytest.raises(SystemExit, match=r"^rank 1: the graph is gone$"):
            worker.execute_model(None)
        with pytest.raises(ValueError, match="the graph is gone"):
            worker_of(0, 2).execute_model(None)


def test_memory_is_measured_with_concentrated_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    worker: Any = object.__new__(HybridGPUWorker)
    monkeypatch.setattr(
        Worker, "determine_available_memory", lambda _: int(offloaded_layer._concentrated)
    )
    assert worker.determine_available_memory() == 1
    assert not offloaded_layer._concentrated

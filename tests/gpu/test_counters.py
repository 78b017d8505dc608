"""What is counted of streamed batches: routing, copies, and who waited for whom."""

import threading
import time
from collections.abc import Iterator
from random import randrange
from typing import Any

import numpy as np
import pytest
import torch

from lvllm.engine import counters as of_engine
from lvllm.engine.counters import SIZES, Reason
from lvllm.gpu import counters
from lvllm.gpu.counters import StreamedCounters
from lvllm.gpu.offload import Offload, mark_step
from lvllm.gpu.offloaded_layer import OffloadedLayer
from lvllm.gpu.stand_in import StandInAccelerator, StandInMark, StandInStream
from tests.random_layers import Random, random_layer

EXPERTS, HIDDEN, TOPK, THRESHOLD = 5, 64, 2, 4


@pytest.fixture
def accelerator() -> Iterator[StandInAccelerator]:
    accelerator = StandInAccelerator()
    yield accelerator
    accelerator.close()


class Counted:
    """Layers of a model, and the numbers of each: of the engine, and of streamed batches."""

    def __init__(self, accelerator: StandInAccelerator, layers: int, **settings: Any) -> None:
        self.random = Random(randrange(1 << 30))
        made = [
            random_layer(self.random, "bf16", EXPERTS, HIDDEN, 96).make() for _ in range(layers)
        ]
        self.layers: list[OffloadedLayer] = []
        offloads = [
            Offload.announce(number, self, lambda: Offload(accelerator, tokens=16, **settings))
            for number in range(layers)
        ]
        for number, (offload, experts) in enumerate(zip(offloads, made, strict=True)):
            self.layers.append(offload.add(number, f"layers.{number}", experts, topk=TOPK))
        self.streamed = [np.zeros(counters.size(EXPERTS), np.int64) for _ in made]
        self.on_cpu = [torch.zeros(of_engine.size(EXPERTS), dtype=torch.int64) for _ in made]
        for layer, streamed, on_cpu in zip(self.layers, self.streamed, self.on_cpu, strict=True):
            of_engine.count(layer.experts.handle, on_cpu)
            if layer.ring is not None:
                layer.count(StreamedCounters(streamed))

    def batch(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids = self.random.integers(0, EXPERTS, tokens, TOPK).int()
        return self.random.normal(tokens, HIDDEN).bfloat16(), ids, torch.ones(tokens, TOPK)

    def batch_for_all(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A batch in which every expert has a token, so that the layer is copied as one group."""
        x, ids, weights = self.batch(tokens)
        return x, (torch.arange(ids.numel()) % EXPERTS).view(ids.shape).int(), weights


def test_a_batch_is_counted_where_it_is_computed(accelerator: StandInAccelerator) -> None:
    model = Counted(accelerator, 2, threshold=THRESHOLD, ahead=1)
    layer, streamed, on_cpu = model.layers[0], model.streamed[0], model.on_cpu[0]
    large, small = model.batch(THRESHOLD + 3), model.batch(THRESHOLD - 1)
    layer.run(*large)
    layer.run(*small)
    mark_step()
    routed = large[1].long().flatten().bincount(minlength=EXPERTS)
    assert streamed[[counters.CALLS, counters.TOKENS]].tolist() == [1, THRESHOLD + 3]
    assert streamed[counters.TOKENS_OF_EXPERTS :].tolist() == routed.tolist()
    assert streamed[counters.READS] == (routed > 0).sum()
    assert streamed[counters.PASSES : counters.PASSES + len(SIZES)].sum() == 1
    # Of the first layer, nothing was copied ahead: only experts with tokens are.
    assert streamed[counters.BYTES] == (routed > 0).sum() * layer.size() // EXPERTS
    assert min(streamed[[counters.COPYING, counters.COMPUTING]]) > 0
    assert on_cpu[of_engine.calls(Reason.SMALL)] == 1
    assert on_cpu[of_engine.tokens(Reason.SMALL)] == THRESHOLD - 1
    assert on_cpu[: of_engine.WAITED].view(-1, 3)[:, 0].sum() == 1


def test_without_streaming_and_in_graphs(
    accelerator: StandInAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Counted(accelerator, 1)
    layer, on_cpu = model.layers[0], model.on_cpu[0]
    layer.run(*model.batch(9))
    monkeypatch.setattr(accelerator, "capturing", lambda: True)
    layer.run(*model.batch(2))
    counted = {reason: on_cpu[of_engine.calls(reason)].item() for reason in Reason}
    assert counted == dict.fromkeys(Reason, 0) | {Reason.OFF: 1, Reason.GRAPH: 1}


def results(model: Counted) -> list[list[int]]:
    """Hits, stalls and misses of each layer."""
    return [
        numbers[[counters.HITS, counters.STALLS, counters.MISSES]].tolist()
        for numbers in model.streamed
    ]


def test_hits_stalls_and_misses(accelerator: StandInAccelerator) -> None:
    begin = time.perf_counter_ns()
    model = Counted(accelerator, 3, threshold=1, ahead=1)
    ring = model.layers[0].ring
    assert ring is not None
    for layer in model.layers:  # every copy is done when the next layer begins
        layer.run(*model.batch_for_all(4))
        ring.settle()
    mark_step()
    assert results(model) == [[0, 0, 1], [1, 0, 0], [1, 0, 0]]
    ring.settle()
    accelerator._delay = lambda: 0.02  # now each copy takes longer than the products before it
    for layer in model.layers:
        layer.run(*model.batch_for_all(4))
    mark_step()
    assert results(model) == [[1, 0, 1], [1, 1, 0], [1, 1, 0]]
    for numbers in model.streamed[1:]:
        assert numbers[counters.WAITING] > 5_000_000
    waited = sum(int(numbers[counters.WAITING]) for numbers in model.streamed)
    copying = sum(int(numbers[counters.COPYING]) for numbers in model.streamed)
    elapsed = time.perf_counter_ns() - begin
    # Layers wait one after the other, and are copied one after the other.
    assert waited < elapsed
    assert copying < elapsed


def test_times_are_known_only_when_the_work_is_done(
    accelerator: StandInAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Counted(accelerator, 1, threshold=1)
    layer, mark, asked = model.layers[0], accelerator.mark, threading.Event()

    def marking(stream: StandInStream) -> StandInMark:
        made = mark(stream)
        if stream is accelerator.compute():
            asked.set()
        return made

    def delay() -> float:
        assert asked.wait(30)
        return 0.0

    # The copy begins when it is waited for. It may begin before, which the wait would not see.
    monkeypatch.setattr(accelerator, "mark", marking)
    monkeypatch.setattr(accelerator, "_delay", delay)
    begin = time.perf_counter_ns()
    layer.run(*model.batch_for_all(8))
    numbers = model.streamed[0]
    assert numbers[counters.BYTES] == 0
    mark_step()
    elapsed = time.perf_counter_ns() - begin
    assert numbers[counters.BYTES] == layer.size()
    # All experts are one group, so waiting and computing come one after the other.
    spent = numbers[counters.WAITING] + numbers[counters.COMPUTING]
    assert 0 < spent < elapsed
    assert 0 < numbers[counters.COPYING] <= numbers[counters.WAITING]


def test_what_is_not_counted_leaves_no_marks(accelerator: StandInAccelerator) -> None:
    model = Counted(accelerator, 2, threshold=1, ahead=1)
    ring = model.layers[0].ring
    assert ring is not None
    ring._counters.clear()
    for layer in model.layers:
        layer.counters = None
        layer.run(*model.batch(4))
    mark_step()
    assert not ring._times._groups
    assert not any(numbers.any() for numbers in model.streamed)

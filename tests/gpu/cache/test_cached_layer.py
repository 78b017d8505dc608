"""Tests the waits between the cache's stream and the caller's, which queues far ahead."""

import threading
from contextlib import AbstractContextManager, nullcontext
from random import randrange
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lvllm.engine.expert_layer import ExpertLayer
from lvllm.gpu.cache import products
from lvllm.gpu.cache.cached_layer import CachedLayer
from lvllm.gpu.stand_in import StandInAccelerator
from tests.gpu.streams import Queueing
from tests.random_layers import Random, random_layer

EXPERTS, HIDDEN, TOPK, TOKENS = 6, 64, 3, 9
IN_SLOTS = [4, 0, 3]
WAITS = 4
"""In each of two layers the cache's stream waits for the caller's, and then this one for it."""

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Late:
    """Lets the two streams meet as late as can be if the wait `missing` is left out.

    Then what a layer is given comes once its slots have been computed, or these are computed once
    their results have been read. No time is waited for, so the result is the same each time.
    """

    def __init__(self, accelerator: StandInAccelerator, layers: int, missing: int | None) -> None:
        self._accelerator, self._layer, self._missing = accelerator, -1, missing
        self._multiply = products.multiply
        self._computed, self._read = ([threading.Event() for _ in range(layers)] for _ in range(2))

    def given(self) -> None:
        """Queue the wait of the next layer's input."""
        self._layer += 1
        if self._missing == 2 * self._layer:
            self._queue(self._computed[self._layer].wait)

    def products(self, *arguments: Any) -> None:
        """Queue the products as a whole. On the host, they wait for their numbers of tokens."""
        if self._missing == 2 * self._layer + 1:
            self._queue(self._read[self._layer].wait)
        self._queue(lambda: self._multiply(*arguments))
        self._queue(self._computed[self._layer].set)

    def read(self) -> None:
        """Queue that the layer's result has been read."""
        self._queue(self._read[self._layer].set)

    def _queue(self, work: Any) -> None:
        self._accelerator.launch(work, self._accelerator.compute())


def run(
    accelerator: StandInAccelerator, layers: list[ExpertLayer], batch: Batch
) -> list[torch.Tensor]:
    """Queue two layers, the second of which computes the first one's result, without a wait.

    Returns both results, and the reads that were counted.
    """
    missing: int | None = None
    queued: AbstractContextManager[object] = nullcontext()
    if isinstance(accelerator, Queueing):
        missing, queued = accelerator.missing, accelerator.queued()
    late, computing = Late(accelerator, len(layers), missing), accelerator.stream()
    table = torch.full((EXPERTS,), -1, dtype=torch.int32)
    table[IN_SLOTS] = torch.arange(len(IN_SLOTS), dtype=torch.int32)
    reads = torch.zeros(EXPERTS, dtype=torch.int32)
    x, ids, weights = (torch.zeros_like(one) for one in batch)
    seen = [torch.zeros_like(x) for _ in layers]
    cached = []
    for experts in layers:
        tensors = {name: of[IN_SLOTS] for name, of in experts.tensors.items()}
        slots: Any = SimpleNamespace(tensors=tensors)
        cached.append(CachedLayer(accelerator, experts, slots, table, reads, computing))
    with queued, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(products, "multiply", late.products)
        given = batch[0]
        for layer, experts, result in zip(cached, layers, seen, strict=True):
            late.given()
            x.copy_(given)
            ids.copy_(batch[1])
            weights.copy_(batch[2])
            rest = layer.split(ids)
            out = torch.ops.lvllm.expert_block(x, rest, weights, experts.handle)
            layer.add(x, ids, weights, out, count=True)
            result.copy_(out)
            late.read()
            given = out * 2
    # This does not wait by events, since one of them may be missing.
    ends = [threading.Event() for _ in range(2)]
    for stream, end in zip((accelerator.compute(), computing), ends, strict=True):
        accelerator.launch(end.set, stream)
    assert all(end.wait(60) for end in ends)
    return [*seen, reads]


def test_each_wait_is_needed() -> None:
    random = Random(randrange(1 << 30))
    layers = [random_layer(random, "bf16", EXPERTS, HIDDEN, 64).make() for _ in range(2)]
    # Each token takes experts with and without slots.
    ids = torch.tensor([0, 1, 3]).repeat(TOKENS, 1).int()
    ids[TOKENS // 2 :] = torch.tensor([4, 2, 5], dtype=torch.int32)
    batch = random.normal(TOKENS, HIDDEN).bfloat16(), ids, random.uniform(0.5, 1, TOKENS, TOPK)
    plain = StandInAccelerator()
    want = run(plain, layers, batch)
    plain.close()
    assert want[-1].tolist() == [2] * EXPERTS

    def right(missing: int | None) -> bool:
        accelerator = Queueing()
        accelerator.missing = missing
        got = run(accelerator, layers, batch)
        accelerator.close()
        assert accelerator.waits == WAITS
        return all(torch.equal(*pair) for pair in zip(got, want, strict=True))

    assert right(None)
    assert [right(missing) for missing in range(WAITS)] == [False] * WAITS

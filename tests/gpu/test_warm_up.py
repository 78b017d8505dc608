"""Tests that no batch wants a kernel that was not compiled while the model was loaded."""

from collections.abc import Iterator, Sequence
from random import randrange
from typing import Any

import pytest
import torch

from lvllm.gpu import streamed
from lvllm.gpu.accelerator import Stream
from lvllm.gpu.cache import products
from lvllm.gpu.kernels import BLOCK_ROWS, experts
from lvllm.gpu.offload import Offload, mark_step
from lvllm.gpu.offloaded_layer import OffloadedLayer
from lvllm.gpu.stand_in import StandInAccelerator
from tests.random_layers import Random, random_layer

EXPERTS, TOPK, MOST = 5, 3, 300


class Compiling(StandInAccelerator):
    """A stand-in that notes which kernels a GPU would compile: one for each kind of arguments."""

    compiles = True

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[tuple[object, ...]] = set()

    def exchange(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: Stream) -> None:
        self.kernels.add(tuple((one.dtype, one.numel() % 16 == 0) for one, _ in pairs))
        super().exchange(pairs, stream)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiling]:
    accelerator = Compiling()
    multiply, multiply_cached = streamed.multiply, products.multiply

    def noted(
        layer: Any, tensors: Any, some: Any, x: Any, pairs: Any, *more: Any, **how: Any
    ) -> None:
        counts = pairs.counts()[some.start : some.stop]
        rows = experts._rows(sum(counts) / max(1, sum(count > 0 for count in counts)))
        accelerator.kernels.add(("streamed", layer.format, rows))
        multiply(layer, tensors, some, x, pairs, *more, **how)

    def noted_cached(layer: Any, slots: Any, table: Any, x: Any, pairs: Any, total: Any) -> None:
        rows = experts._rows(len(pairs.slots) / min(EXPERTS, len(pairs.slots)))
        accelerator.kernels.add(("cached", layer.format, rows))
        multiply_cached(layer, slots, table, x, pairs, total)

    monkeypatch.setattr(streamed, "multiply", noted)
    monkeypatch.setattr(products, "multiply", noted_cached)
    yield accelerator
    accelerator.close()


class Model:
    """Takes the place of what the layers of a model have in common."""


def make(
    accelerator: Compiling, hidden: int, formats: list[str], **settings: Any
) -> list[OffloadedLayer]:
    draw, model = Random(randrange(1 << 30)), Model()
    made = [random_layer(draw, format, EXPERTS, hidden, 64).make() for format in formats]
    joined = [
        Offload.announce(n, model, lambda: Offload(accelerator, MOST, **settings))
        for n in range(len(made))
    ]
    return [
        one.add(n, f"layers.{n}", layer, TOPK)
        for n, (one, layer) in enumerate(zip(joined, made, strict=True))
    ]


def run(layers: list[OffloadedLayer], tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
    draw = Random(randrange(1 << 30))
    for layer in layers:
        x = draw.normal(tokens, layer.experts.hidden_size).to(dtype)
        ids = draw.integers(0, EXPERTS, tokens, TOPK).int()
        layer.run(x, ids, draw.uniform(0, 1, tokens, TOPK))
    mark_step()


@pytest.mark.parametrize("hidden", [96, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_batches_and_graphs(accelerator: Compiling, hidden: int, dtype: torch.dtype) -> None:
    layers = make(accelerator, hidden, ["bf16", "bf16"], dtype=dtype)
    compiled = set(accelerator.kernels)
    for tokens in range(1, 50):
        run(layers, tokens, dtype)
    assert accelerator.kernels == compiled


def test_streamed_batches(accelerator: Compiling) -> None:
    layers = make(accelerator, 96, ["bf16", "int4", "bf16"], threshold=2, ahead=1)
    compiled = set(accelerator.kernels)
    assert {one for one in compiled if "streamed" in one} == {
        ("streamed", format, rows) for format in ("bf16", "int4") for rows in BLOCK_ROWS
    }
    for tokens in (1, 7, 100, MOST):
        run(layers, tokens)
    assert accelerator.kernels == compiled


def test_batches_that_look_experts_up(accelerator: Compiling) -> None:
    layers = make(accelerator, 96, ["bf16", "bf16"], cache_bytes=1 << 20)
    compiled = set(accelerator.kernels)
    assert {one for one in compiled if "cached" in one} == {
        ("cached", "bf16", rows) for rows in BLOCK_ROWS
    }
    for tokens in (1, 7, 27, 100, MOST):
        run(layers, tokens)
    assert accelerator.kernels == compiled

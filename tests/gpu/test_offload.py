"""Tests the offloaded layers of a model: the path of each batch, and the operator."""

import gc
import re
import threading
import weakref
from collections.abc import Iterator
from random import Random as Draw
from random import randrange
from typing import Any

import pytest
import torch

from lvllm.engine.expert_layer import ExpertLayer
from lvllm.gpu import break_even, offload, streamed
from lvllm.gpu.break_even import MeasuredThreshold
from lvllm.gpu.hybrid import raise_host_call_error
from lvllm.gpu.offload import Offload, mark_step
from lvllm.gpu.offloaded_layer import ComputePath, OffloadedLayer, choose_path, concentrated_routing
from lvllm.gpu.resident_layer import ResidentLayer
from lvllm.gpu.ring import StagingRing
from lvllm.gpu.stand_in import StandInAccelerator
from lvllm.gpu.watchdog import Watchdog
from tests.gpu.deferral import deferring
from tests.gpu.streams import RecordedAhead
from tests.random_layers import Random, random_layer

EXPERTS, HIDDEN, TOPK, MOST = 5, 96, 3, 24


class Pinning(StandInAccelerator):
    """A stand-in that notes what is pinned."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.pins: list[int] = []

    def pin(self, tensor: torch.Tensor) -> None:
        super().pin(tensor)
        self.pins.append(tensor.data_ptr())

    def unpin(self, tensor: torch.Tensor) -> None:
        self.pins.remove(tensor.data_ptr())
        super().unpin(tensor)


@pytest.fixture
def accelerator() -> Iterator[Pinning]:
    draw = Draw(randrange(1 << 30))
    accelerator = Pinning(delay=lambda: draw.random() * 3e-4)
    yield accelerator
    accelerator.close()


class Model:
    """Takes the place of what the layers of a model have in common."""


def model(
    accelerator: StandInAccelerator, numbers: tuple[int, ...], **settings: Any
) -> tuple[list[ExpertLayer], list[OffloadedLayer]]:
    """Make the layers of a model, which are announced, loaded and then added."""
    random = Random(randrange(1 << 30))
    formats = ("bf16", "int4", "fp8")
    made = [
        random_layer(random, formats[n % 3], EXPERTS, HIDDEN, 64, bias=n % 2 == 1).make()
        for n in numbers
    ]
    one = Model()
    announced = [
        Offload.announce(n, one, lambda: Offload(accelerator, MOST, **settings)) for n in numbers
    ]
    return made, [
        offload.add(n, f"layers.{n}", layer, TOPK)
        for offload, n, layer in zip(announced, numbers, made, strict=True)
    ]


def batch(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = Random(randrange(1 << 30))
    ids = random.integers(-1, EXPERTS, tokens, TOPK).to(torch.int32)
    return random.normal(tokens, HIDDEN).bfloat16(), ids, random.uniform(0, 1, tokens, TOPK)


def test_path() -> None:
    for tokens, capturing, threshold, way in (
        (1, False, 0, ComputePath.CPU),
        (9000, False, 0, ComputePath.CPU),
        (99, False, 100, ComputePath.CPU),
        (100, False, 100, ComputePath.STREAMED),
        (100, True, 100, ComputePath.CPU),
    ):
        assert choose_path(tokens, capturing, threshold) is way


def test_the_operator_computes_any_layer_of_a_model(accelerator: Pinning) -> None:
    made, kept = model(accelerator, (0, 2, 3))
    assert len({layer.offload for layer in kept}) == 1
    for tokens in (1, MOST, 5, MOST + 9):  # A batch of several ranks may be larger.
        for layer in made:
            x = batch(tokens)
            assert torch.equal(torch.ops.lvllm.routed_experts(*x, layer.handle), layer(*x))
    operator, arguments = torch.ops.lvllm.routed_experts.default, (*batch(3), made[1].handle)
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    assert not accelerator.pins  # Nothing is streamed.


def test_the_operator_in_a_compiled_function(accelerator: Pinning) -> None:
    made, kept = model(accelerator, (0, 1))

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def run(x: Any, ids: Any, weights: Any, first: Any, second: Any) -> Any:
        h = torch.ops.lvllm.routed_experts(x * 2, ids, weights, first)
        return torch.ops.lvllm.routed_experts(h, ids, weights, second) + x

    for tokens in (4, 7, 20):
        x, ids, weights = batch(tokens)
        out = run(x, ids, weights, *(layer.handle for layer in made))
        assert torch.equal(out, made[1](made[0](x * 2, ids, weights), ids, weights) + x)
    assert kept


def test_long_batches_are_streamed(accelerator: Pinning, monkeypatch: pytest.MonkeyPatch) -> None:
    made, kept = model(accelerator, (1, 2, 5), threshold=10, ahead=1)
    assert len(accelerator.pins) == sum(len(layer.tensors) for layer in made)
    streamed_tokens = []

    def run(
        layer: ExpertLayer, ring: StagingRing, number: int, *x: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        for some, tensors in ring.stream(number, [1] * layer.num_experts):
            assert tensors.keys() == layer.tensors.keys()
            for name, tensor in layer.tensors.items():
                wanted = tensor[some.start : some.stop].view(torch.uint8)
                assert torch.equal(tensors[name].view(torch.uint8), wanted)
        streamed_tokens.append(len(x[0]))
        return layer(*x)

    monkeypatch.setattr(streamed, "run", run)
    for tokens in (12, 3, 10, 9, MOST):
        for layer in made:
            x = batch(tokens)
            assert torch.equal(torch.ops.lvllm.routed_experts(*x, layer.handle), layer(*x))
    assert streamed_tokens == [12] * 3 + [10] * 3 + [MOST] * 3

    # The next batch can run after one that failed.
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(streamed, "run", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.ops.lvllm.routed_experts(*batch(11), made[0].handle)
    monkeypatch.setattr(streamed, "run", run)
    x = batch(11)
    assert torch.equal(torch.ops.lvllm.routed_experts(*x, made[0].handle), made[0](*x))
    del kept
    gc.collect()
    assert not accelerator.pins


@pytest.mark.parametrize("found", [10, 0])
def test_a_threshold_that_is_measured(
    found: int, accelerator: Pinning, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(*arguments: Any) -> tuple[int, None]:
        measured.append(arguments)
        return found, None

    def run(layer: ExpertLayer, _r: Any, _n: int, *x: torch.Tensor, **_: Any) -> torch.Tensor:
        ways.append(len(x[0]))
        return layer(*x)

    ways = list[int]()
    monkeypatch.setattr(break_even, "measure_threshold", measure)
    monkeypatch.setattr(streamed, "run", run)
    auto = MeasuredThreshold(torch.bfloat16)
    made, kept = model(accelerator, (1, 2, 5), threshold=auto, ahead=1)
    assert len(accelerator.pins) == sum(len(layer.tensors) for layer in made)
    ((*given, layers, most),) = measured
    sizes = sorted((layer.size(), layer) for layer in kept)
    assert (given[0], given[2], layers, most) == (auto, sizes[1][1], 3, MOST)
    ring = weakref.ref(given.pop(1))
    measured.clear()
    for tokens in (9, 10, MOST):
        for layer in made:
            x = batch(tokens)
            assert torch.equal(torch.ops.lvllm.routed_experts(*x, layer.handle), layer(*x))
    assert ways == ([10] * 3 + [MOST] * 3 if found else [])
    assert (ring() is not None) == bool(found)  # Its memory is freed with it.


def test_measuring_comes_to_an_end_and_streaming_with_it(
    accelerator: Pinning, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products are made up and take no time, so large batches may be streamed."""
    monkeypatch.setattr(break_even, "SECONDS", 0.2)
    run = streamed.run
    monkeypatch.setattr(streamed, "run", lambda layer, ring, number, x, *_, **__: x)
    made, kept = model(accelerator, (0, 1), threshold=MeasuredThreshold(torch.bfloat16), ahead=1)
    monkeypatch.setattr(streamed, "run", run)
    assert 0 <= kept[0].threshold <= MOST
    for tokens in (1, MOST, 7):
        for layer in made:
            x = batch(tokens)
            got = torch.ops.lvllm.routed_experts(*x, layer.handle)
            assert torch.linalg.norm(got - layer(*x)) <= 0.02 * torch.linalg.norm(layer(*x))


def test_batches_of_concentrated_routing(
    accelerator: Pinning, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While memory is measured, all tokens have the same experts."""
    made, kept = model(accelerator, (1,), threshold=10)
    plain, seen = streamed.run, []

    def run(layer: Any, ring: Any, number: int, x: Any, ids: Any, w: Any, **_: Any) -> torch.Tensor:
        seen.append(ids.clone())
        return plain(layer, ring, number, x, ids, w)

    monkeypatch.setattr(streamed, "run", run)
    x = batch(11)
    with concentrated_routing():
        torch.ops.lvllm.routed_experts(*x, made[0].handle)
        wide = (x[0], *(torch.cat([part] * 2, dim=1) for part in x[1:]))
        torch.ops.lvllm.routed_experts(*wide, made[0].handle)
    torch.ops.lvllm.routed_experts(*x, made[0].handle)
    assert seen[0].tolist() == [[0, 1, 2]] * 11
    assert seen[1].tolist() == [[0, 1, 2, 3, 4, -1]] * 11
    assert torch.equal(seen[2], x[1])
    assert kept


def test_how_fast_memory_was_pinned_is_said(
    accelerator: Pinning, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(offload.logger, "info", lambda line, *values: said.append(line % values))
    experts, _ = model(accelerator, (0, 1), threshold=8)
    size = sum(tensor.nbytes for layer in experts for tensor in layer.tensors.values())
    pattern = rf"^LvLLM: pinned {size / (1 << 30):.2f} GiB of experts in [\d.]+ s while loading, "
    assert [line for line in said if re.search(pattern, line)]


def test_an_offload_ends_with_its_layers(accelerator: Pinning) -> None:
    made, kept = model(
        accelerator, (0, 1), threshold=10, ahead=1, watchdog=Watchdog(accelerator, 100, print)
    )
    for tokens in (12, 2):
        x = batch(tokens)
        assert torch.ops.lvllm.routed_experts(*x, made[0].handle).shape == x[0].shape
    offload = weakref.ref(kept[0].offload)
    memory = [weakref.ref(tensor) for layer in made for tensor in layer.tensors.values()]
    # Another model has an Offload of its own, and so has one that is built after another was
    # given up.
    _, other = model(accelerator, (2, 3))
    given_up = Offload.announce(0, Model(), lambda: Offload(accelerator, MOST))
    _, last = model(accelerator, (0, 1))
    owners = [{id(layer.offload) for layer in layers} for layers in (kept, other, last)]
    assert all(len(owner) == 1 for owner in owners)
    assert len(set.union({id(given_up)}, *owners)) == 4
    # The same holds if the two have no number in common.
    given_up = Offload.announce(9, Model(), lambda: Offload(accelerator, MOST))
    _, beside = model(accelerator, (2, 3))
    assert {id(layer.offload) for layer in beside}.isdisjoint({id(given_up)})
    del beside
    ring = kept[0].ring
    assert ring is not None
    ring.settle()  # The next layer is being copied.
    del made, kept, ring
    gc.collect()
    assert offload() is None
    assert all(tensor() is None for tensor in memory)


def test_the_steps_of_every_model_are_watched() -> None:
    """A process may have a main model and a draft model."""
    gc.collect()  # The models of other tests are not marked any more.
    accelerator = RecordedAhead()
    late, gate = [threading.Event() for _ in range(3)], threading.Event()

    def watchdog(one: threading.Event) -> Watchdog:
        return Watchdog(accelerator, 0.2, lambda _: one.set())

    kept = [model(accelerator, (0, 1), watchdog=watchdog(one)) for one in late]
    gone, *_ = late
    del kept[0]
    gc.collect()
    accelerator.launch(lambda: gate.wait(30), accelerator.compute())
    mark_step()
    assert all(one.wait(30) for one in late if one is not gone)
    assert not gone.is_set()
    gate.set()
    accelerator.synchronize(accelerator.compute())
    del kept
    gc.collect()
    mark_step()
    accelerator.close()


def test_an_error_in_a_callback_names_its_layer(accelerator: Pinning) -> None:
    made, kept = model(accelerator, (4,))
    x, ids, weights = batch(2)
    ids[1, 2] = EXPERTS
    with pytest.raises(RuntimeError, match=r"^layers.4: topk_ids\[1, 2\] is 5, must be"):
        torch.ops.lvllm.routed_experts(x, ids, weights, made[0].handle)
    raise_host_call_error()
    assert kept


def test_rows_that_a_graph_could_not_compute_are_refused(
    accelerator: Pinning, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host would wait for the device between their products."""
    layer = random_layer(Random(1), "bf16", EXPERTS, 33, 64).make()
    one, kept = Model(), []

    def add(number: int) -> OffloadedLayer:
        joined = Offload.announce(number, one, lambda: Offload(accelerator, 8, cache_bytes=1 << 20))
        kept.append(joined)
        return joined.add(number, f"layers.{number}", layer, TOPK)

    assert add(0).cache is not None
    monkeypatch.setattr(accelerator, "device", torch.device("cuda"))
    said = (
        "the GPU's kernels want rows of whole words, but those of w13 have 33 weights in bf16;"
        " allowed is a multiple of 2"
    )
    with pytest.raises(ValueError, match=f"^layers.1: {said}, or LVLLM_GPU_EXPERT_CACHE=0$"):
        add(1)
    with pytest.raises(ValueError, match=f"^{said}$"):
        ResidentLayer(accelerator, layer)
    assert layer.tensors  # It is refused before anything is done.


def test_experts_are_deferred_from_layer_to_layer(accelerator: Pinning) -> None:
    """Of offloaded layers, whatever lies between them, in passes that may be given up."""
    made, kept = model(accelerator, (0, 3, 4), defer=2)
    for tokens in (1, 8, 9, 3, MOST):
        batches = [batch(tokens) for _ in made]
        for given_up in range(len(made)):
            for layer in made[:given_up]:
                torch.ops.lvllm.routed_experts(*batch(5), layer.handle)
        want = deferring(made, batches, 2 if tokens <= 8 else 0)
        for layer, one, wanted in zip(made, batches, want, strict=True):
            assert torch.equal(torch.ops.lvllm.routed_experts(*one, layer.handle), wanted)
    # The error of a deferred expert is found when the next layer waits for it, or before.
    x, ids, weights = batch(2)
    ids[1, 2], weights[1, 2] = EXPERTS, 0

    def fail() -> None:
        torch.ops.lvllm.routed_experts(x, ids, weights, made[0].handle)
        torch.ops.lvllm.routed_experts(*batch(2), made[1].handle)

    with pytest.raises(RuntimeError, match=r"^layers.0: topk_ids\[1, 2\] is 5, must be"):
        fail()
    one = batch(2)
    out = torch.ops.lvllm.routed_experts(*one, made[0].handle)
    assert torch.equal(out, deferring(made, [one] * 3, 2)[0])
    assert kept


def test_nothing_is_deferred_while_the_threshold_is_measured(
    accelerator: Pinning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(break_even, "SECONDS", 0.2)
    made, kept = model(accelerator, (1, 2), threshold=MeasuredThreshold(torch.bfloat16), defer=1)
    for offloaded in kept:
        offloaded.threshold = 0
    batches = [batch(4) for _ in made]
    for layer, one, wanted in zip(made, batches, deferring(made, batches, 1), strict=True):
        assert torch.equal(torch.ops.lvllm.routed_experts(*one, layer.handle), wanted)


def test_memory_that_cannot_be_pinned(
    accelerator: Pinning, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(tensor: torch.Tensor) -> None:
        raise RuntimeError("cannot pin 3 GiB")

    monkeypatch.setattr(accelerator, "pin", refuse)
    with pytest.raises(MemoryError, match=r"^layers.3: w13: cannot pin 3 GiB$"):
        model(accelerator, (3, 4), threshold=1)

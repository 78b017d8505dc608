"""Tests layers on the CPU in stream order, on the stand-in: the bits are those of a direct call."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random as Draw
from random import randrange
from typing import Any

import pytest
import torch

from lvllm import engine
from lvllm.engine.expert_layer import ExpertLayer
from lvllm.engine.ops import raw_ops
from lvllm.gpu import hybrid
from lvllm.gpu.accelerator import Event, Stream
from lvllm.gpu.hybrid import DEFERRING_TOKENS, HybridCall, PinnedBuffers
from lvllm.gpu.stand_in import StandInAccelerator
from tests.gpu.deferral import deferring
from tests.random_layers import FORMATS, Random, random_layer

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
EXPERTS, HIDDEN, TOPK, MOST = 5, 96, 3, 37
WAYS = ("hostfunc", "mailbox")


@contextmanager
def on_host(kind: Any = StandInAccelerator, seconds: float = 3e-4) -> Iterator[Any]:
    """Open a stand-in whose streams have random delays."""
    draw = Draw(randrange(1 << 30))
    accelerator = kind(delay=lambda: draw.random() * seconds)
    yield accelerator
    accelerator.close()


def make_layer(random: Random, format: str = "bf16", **more: Any) -> ExpertLayer:
    return random_layer(random, format, EXPERTS, HIDDEN, 64, **more).make()


def make_batch(random: Random, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Batch:
    """Make a random batch. Some of its slots are skipped."""
    ids = random.integers(-1, EXPERTS, tokens, TOPK).to(torch.int32)
    return random.normal(tokens, HIDDEN).to(dtype), ids, random.uniform(0, 1, tokens, TOPK)


def calls(
    accelerator: StandInAccelerator,
    layers: list[ExpertLayer],
    way: str = "hostfunc",
    **more: Any,
) -> list[HybridCall]:
    """Make the calls of layers that share buffers, whose copies have a stream of their own."""
    sizes = [(HIDDEN, TOPK)]
    buffers = PinnedBuffers(accelerator, MOST, sizes, stream=accelerator.stream(), **more)
    assert buffers.choose_call(way, layers[0]) == way
    return [HybridCall(buffers, layer, TOPK) for layer in layers]


@pytest.mark.parametrize("way", WAYS)
def test_any_format_and_batch_and_layers_in_turns(way: str) -> None:
    random = Random(randrange(1 << 30))
    layers = [make_layer(random, format, bias=True) for format in FORMATS]
    with on_host() as accelerator:
        pairs = list(zip(layers, calls(accelerator, layers, way), strict=True))
        for tokens in (1, MOST, 2, 0, 8, 1, 36, 5):
            for layer, call in pairs:
                batch = make_batch(random, tokens, (torch.bfloat16, torch.float16)[randrange(2)])
                out = call(*batch)
                assert out.dtype == batch[0].dtype
                assert torch.equal(out, layer(*batch))


def test_tensors_of_other_types_and_strides() -> None:
    random = Random(randrange(1 << 30))
    layer = make_layer(random)
    with on_host() as accelerator:
        (call,) = calls(accelerator, [layer])
        x, ids, weights = make_batch(random, 20)
        want = layer(x, ids, weights.bfloat16().float())
        wide = torch.cat([x, x], dim=1)[:, :HIDDEN]
        out = call(wide, ids.T.contiguous().T.long(), weights.bfloat16())
    assert torch.equal(out, want)


def test_batches_larger_than_the_memory_go_in_parts() -> None:
    random = Random(randrange(1 << 30))
    layer = make_layer(random)
    log = torch.zeros(50 + 2, 3, dtype=torch.int64)
    with on_host() as accelerator:
        (call,) = calls(accelerator, [layer], limit=7 * (4 * HIDDEN + 8 * TOPK))
        x, ids, weights = make_batch(random, 50)
        ids[:, 0] = 0
        assert torch.equal(call(x, ids, weights), layer(x, ids, weights))
        # Each part reports its rows by their numbers in the whole batch.
        x[[3, 33]] = torch.nan
        engine.watch(log)
        try:
            call(x, ids, weights)
        finally:
            engine.watch(None)
    assert log[1:, 0].nonzero().flatten().tolist() == [3, 33]


class Deferred(StandInAccelerator):
    """A stand-in whose caller's stream is a thread, too: as on CUDA, no work is done at once.

    `missing` is the wait that is left out, counted from 0.
    """

    missing: int | None = None
    waits = 0

    def compute(self) -> Stream:
        if not hasattr(self, "_own"):
            self._own = self.stream()
        return self._own

    def wait(self, event: Event, stream: Stream) -> None:
        self.waits += 1
        if self.waits - 1 != self.missing:
            super().wait(event, stream)


def beside_shared_experts(accelerator: Deferred) -> bool:
    """Run a layer between work that makes x and work that reads the result, beside other experts.

    Returns whether the result is correct.
    """
    random = Random(randrange(1 << 30))
    layer, shared = make_layer(random), make_layer(random, "int8")
    (call,) = calls(accelerator, [layer])
    compute, other = accelerator.compute(), accelerator.stream()
    batch, x_of_shared = make_batch(random, 30), make_batch(random, 4)
    x, seen = torch.zeros_like(batch[0]), torch.zeros_like(batch[0])
    beside: list[torch.Tensor] = []

    def produce() -> None:
        time.sleep(0.05)
        x.copy_(batch[0])

    accelerator.launch(produce, compute)
    for _ in range(8):
        accelerator.launch(lambda: beside.append(shared(*x_of_shared)), other)
    out = call(x, *batch[1:])
    accelerator.launch(lambda: seen.copy_(out), compute)
    # This does not wait by events, since one of them may be missing. A call of lk after the end of
    # its layer would leave an error, which a later test would find.
    done: list[None] = []
    streams: tuple[Any, ...] = (compute, other, call.buffers.stream)
    for stream in streams:
        accelerator.launch(lambda: done.append(None), stream)
    while len(done) < len(streams):
        time.sleep(0.001)
    assert all(torch.equal(one, shared(*x_of_shared)) for one in beside)
    return torch.equal(seen, layer(*batch))


def test_waits_for_its_input_and_is_waited_for() -> None:
    with on_host(Deferred) as accelerator:
        assert beside_shared_experts(accelerator)
        waits = accelerator.waits
    assert waits == 2
    for missing in range(waits):
        with on_host(Deferred) as accelerator:
            accelerator.missing = missing
            assert not beside_shared_experts(accelerator)
            accelerator.synchronize(accelerator.compute())


def test_arguments_of_ended_calls_are_used_again() -> None:
    random = Random(randrange(1 << 30))
    layer = make_layer(random)
    with on_host(Deferred) as accelerator:
        buffers = PinnedBuffers(accelerator, MOST, [(HIDDEN, TOPK)])
        call = HybridCall(buffers, layer, TOPK)
        for _ in range(2):
            results = []
            for _ in range(12):  # None of them has to end before the next is queued.
                batch = make_batch(random, randrange(1, MOST))
                results.append((batch, call(*batch)))
            accelerator.synchronize(accelerator.compute())
            assert all(torch.equal(out, layer(*batch)) for batch, out in results)
        assert len(buffers._arguments) <= 12


class Refusing(StandInAccelerator):
    """A stand-in that cannot write words in a stream."""

    def write_word(self, address: int, value: int, stream: Stream) -> None:
        raise RuntimeError("no words here")


def test_the_faster_way_is_chosen() -> None:
    random = Random(randrange(1 << 30))
    layer, batch = make_layer(random), make_batch(random, 3)
    for kind, said in (
        (StandInAccelerator, r"^(hostfunc|mailbox): a call takes [\d.]+ us as hostfunc, [\d.]+ us"),
        (Refusing, "^hostfunc, since a mailbox is not possible: no words here$"),
    ):
        with on_host(kind, seconds=0) as accelerator:
            buffers = PinnedBuffers(accelerator, MOST, [(HIDDEN, TOPK)])
            assert re.search(said, buffers.choose_call("auto", layer))
            assert torch.equal(HybridCall(buffers, layer, TOPK)(*batch), layer(*batch))
    hybrid.raise_host_call_error()


def test_a_mailbox_that_is_not_possible_is_refused() -> None:
    layer = make_layer(Random(1))
    with on_host(Refusing) as accelerator:
        buffers = PinnedBuffers(accelerator, MOST, [(HIDDEN, TOPK)])
        with pytest.raises(ValueError, match=r"^LVLLM_GPU_CALL=mailbox is not possible here: no"):
            buffers.choose_call("mailbox", layer)


class Recorder(StandInAccelerator):
    """Records what is put in streams instead of doing it, as the capture of a graph does."""

    recorded: list[Callable[[], None]] | None = None

    def capturing(self) -> bool:
        return self.recorded is not None

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        self._keep(partial(super().copy, target, source, stream))

    def call(self, function: int, argument: int, stream: Stream) -> None:
        self._keep(partial(super().call, function, argument, stream))

    def write_word(self, address: int, value: int, stream: Stream) -> None:
        self._keep(partial(super().write_word, address, value, stream))

    def await_word(self, address: int, value: int, stream: Stream) -> None:
        self._keep(partial(super().await_word, address, value, stream))

    def record(self, event: Event, stream: Stream) -> None:
        self._keep(partial(super().record, event, stream))

    def wait(self, event: Event, stream: Stream) -> None:
        self._keep(partial(super().wait, event, stream))

    def _keep(self, work: Callable[[], None]) -> None:
        if self.recorded is None:
            work()
        else:
            self.recorded.append(work)


@pytest.mark.parametrize("way", WAYS)
def test_graphs_keep_their_arguments(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured once, and replayed with new tokens among calls of other sizes."""
    random = Random(randrange(1 << 30))
    layers = [make_layer(random), make_layer(random, "int4")]
    with on_host(Recorder) as accelerator:
        both = calls(accelerator, layers, way, limit=20 * (4 * HIDDEN + 8 * TOPK))

        def capture(tokens: int) -> tuple[Batch, list[torch.Tensor], list[Callable[[], None]]]:
            batch = make_batch(random, tokens)
            accelerator.recorded = []
            outs = [call(*batch) for call in both]
            steps, accelerator.recorded = accelerator.recorded, None
            return batch, outs, steps

        graphs = [capture(tokens) for tokens in (1, 2, 8, 30)]
        made: list[hybrid._Argument] = []

        class Counted(hybrid._Argument):
            def __init__(self) -> None:
                super().__init__()
                made.append(self)

        monkeypatch.setattr(hybrid, "_Argument", Counted)
        # Another graph of the same size uses the same arguments.
        graphs.append(capture(8))
        assert not made
        for _ in range(6):
            for batch, outs, steps in graphs:
                for kept, new in zip(batch, make_batch(random, len(batch[0])), strict=True):
                    kept.copy_(new)
                other = make_batch(random, randrange(1, MOST))
                assert torch.equal(both[0](*other), layers[0](*other))
                for step in steps:
                    step()
                for layer, out in zip(layers, outs, strict=True):
                    assert torch.equal(out, layer(*batch))
        assert 0 < len(made) <= 2  # These are at most the parts of one batch.


@pytest.mark.parametrize("way", WAYS)
def test_deferred_experts_come_one_layer_later(way: str) -> None:
    """In calls outside graphs and in graphs, whose replays follow each other in any order."""
    random = Random(randrange(1 << 30))
    layers = [make_layer(random, format) for format in ("bf16", "int4", "fp8")]
    with on_host(Recorder) as accelerator:
        sequence = calls(accelerator, layers, way)
        sequence[0].first = sequence[-1].last = True
        sequence[0].buffers.defer(2)

        def capture(
            tokens: int,
        ) -> tuple[list[Batch], list[torch.Tensor], list[Callable[[], None]]]:
            batches = [make_batch(random, tokens) for _ in layers]
            accelerator.recorded = []
            outs = [call(*batch) for call, batch in zip(sequence, batches, strict=True)]
            steps, accelerator.recorded = accelerator.recorded, None
            return batches, outs, steps

        graphs = [capture(tokens) for tokens in (1, 3, DEFERRING_TOKENS)]
        for _ in range(4):
            for batches, outs, steps in graphs:
                for batch in batches:
                    for kept, new in zip(batch, make_batch(random, len(batch[0])), strict=True):
                        kept.copy_(new)
                for step in steps:
                    step()
                want = deferring(layers, batches, 2)
                assert all(torch.equal(*pair) for pair in zip(outs, want, strict=True))
            for tokens in (2, DEFERRING_TOKENS, DEFERRING_TOKENS + 1, MOST):
                dtype = (torch.bfloat16, torch.float16)[randrange(2)]
                batches = [make_batch(random, tokens, dtype) for _ in layers]
                outs = [call(*batch) for call, batch in zip(sequence, batches, strict=True)]
                want = deferring(layers, batches, 2 if tokens <= DEFERRING_TOKENS else 0)
                assert all(torch.equal(*pair) for pair in zip(outs, want, strict=True))
    hybrid.raise_host_call_error()


def test_batches_in_parts_defer_nothing() -> None:
    random = Random(randrange(1 << 30))
    layer = make_layer(random)
    with on_host() as accelerator:
        (call,) = calls(accelerator, [layer], limit=3 * (4 * HIDDEN + 8 * TOPK))
        call.buffers.defer(1)
        for tokens in (4, 7):
            batch = make_batch(random, tokens)
            assert torch.equal(call(*batch), layer(*batch))


def test_errors_leave_nan_and_their_text() -> None:
    random = Random(randrange(1 << 30))
    layer = make_layer(random)
    handle = int(layer.handle)
    with on_host() as accelerator:
        (call,) = calls(accelerator, [layer])
        x, ids, weights = make_batch(random, 9)
        wrong = ids.clone()
        wrong[4, 1] = EXPERTS
        assert call(x, wrong, weights).isnan().all()
        found, text = raw_ops.host_call_error()
        assert (found, text) == (handle, "topk_ids[4, 1] is 5, must be -1 (skip) to 4")
        assert raw_ops.host_call_error() == (0, "")
        assert torch.equal(call(x, ids, weights), layer(x, ids, weights))
        layer.release()
        assert call(x, ids, weights).isnan().all()
        found, text = raw_ops.host_call_error()
        assert found == handle
        assert "names no expert layer" in text
        begun, ended, last = raw_ops.host_call_progress()
        assert begun == ended
        assert last == handle

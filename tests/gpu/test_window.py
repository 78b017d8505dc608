"""Tests the prefetch window: each computation reads exactly its layer, whatever is late."""

import random
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lvllm.gpu.window import ALIGNMENT, PrefetchWindow
from tests.gpu.streams import Recorded, RecordedAhead, uneven

Weights = dict[str, torch.Tensor]

FORMATS: tuple[dict[str, torch.dtype], ...] = (
    {"w13": torch.bfloat16, "w2": torch.bfloat16},
    {"w13": torch.float16, "w2": torch.float16, "w2_bias": torch.float32},
    {
        "w13": torch.float8_e4m3fn,
        "w2": torch.float8_e4m3fn,
        "w13_scale": torch.float32,
        "w2_scale": torch.float32,
    },
    {"w13": torch.int8, "w2": torch.int8, "w2_scale": torch.float32, "w13_scale": torch.float32},
    {"w13": torch.uint8, "w2": torch.uint8, "w13_scale": torch.bfloat16, "w13_zero": torch.uint8},
    {"w13": torch.uint8, "w2": torch.uint8, "w13_scale": torch.float8_e4m3fn},
)
"""The names and dtypes of a layer's tensors. Scales and zero points may be missing."""


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return values.view(dtype).view(shape)


def random_layer(draw: random.Random) -> Weights:
    return {
        name: random_tensor(tuple(draw.randint(1, 12) for _ in range(3)), dtype)
        for name, dtype in draw.choice(FORMATS).items()
    }


def padded(layer: Mapping[str, torch.Tensor]) -> int:
    return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in layer.values())


def wrong(views: Mapping[str, torch.Tensor], layer: Weights, pause: float) -> list[str]:
    """Return the names of views that do not hold the layer. They are read slowly, twice."""
    found = [name for name in layer if views[name].dtype != layer[name].dtype]
    found += [name for name in layer if views[name].shape != layer[name].shape]
    for _ in range(2):
        for name, tensor in layer.items():
            pairs = zip(as_bytes(views[name]).chunk(3), as_bytes(tensor).chunk(3), strict=True)
            for got, wanted in pairs:
                if not torch.equal(got, wanted):
                    found.append(name)
                time.sleep(pause)
    return found


class Passes(RuleBasedStateMachine):
    """Passes over a model of which some layers are streamed. They begin and end anywhere."""

    @initialize(
        seed=st.integers(0, 1 << 32),
        count=st.integers(1, 7),
        ahead=st.integers(0, 4),
        runs_ahead=st.booleans(),
        longest=st.tuples(*[st.sampled_from((0.0, 0.0005, 0.002))] * 2),
        pause=st.sampled_from((0.0, 0.0001)),
    )
    def build(
        self,
        seed: int,
        count: int,
        ahead: int,
        runs_ahead: bool,
        longest: tuple[float, float],
        pause: float,
    ) -> None:
        draw = random.Random(seed)
        numbers = sorted(draw.sample(range(12), count))  # The others are resident.
        self.layers = {number: random_layer(draw) for number in numbers}
        self.at = -1
        self.staged: int | None = None
        self.coming: list[int] = []
        """Layers that are copied before they are asked for."""
        self.pause = pause
        self.faults: list[tuple[int, list[str]]] = []
        kind = RecordedAhead if runs_ahead else Recorded
        self.accelerator = kind(uneven(seed, longest))
        self.window = PrefetchWindow(self.accelerator, self.layers, ahead)
        self.ahead = ahead
        buffers = min(ahead + 1, count)
        assert self.window.staging_bytes == buffers * max(map(padded, self.layers.values()))
        assert self.accelerator.allocated == self.window.staging_bytes

    @rule(step=st.sampled_from((1, 1, 1, 1, 1, 1, 2, 3)), reads=st.integers(1, 2))
    def compute_on(self, step: int, reads: int) -> None:
        """Compute the next layer, or a later one: a pass may leave layers out."""
        self.at += step
        if self.at >= 12:  # The pass is complete. Its last layer may not be released.
            self.at = -1
        else:
            self.compute(reads)

    @rule(at=st.integers(0, 11))
    def begin_anew(self, at: int) -> None:
        """Begin a pass. The pass before ends where it was, and its layer may not be released."""
        self.at = at
        self.compute(1)

    @precondition(lambda self: self.staged is not None)
    @rule()
    def release(self) -> None:
        assert self.staged is not None
        self.window.release(self.staged)
        self.staged = None

    @rule(release=st.booleans())
    def abort(self, release: bool) -> None:
        if release and self.staged is not None:
            self.window.release(self.staged)
        self.window.abort()
        self.staged, self.at, self.coming = None, -1, []

    @rule()
    def catch_up(self) -> None:
        self.accelerator.synchronize(self.accelerator.compute())

    def compute(self, reads: int) -> None:
        layer = self.layers.get(self.at)
        if layer is None:
            return
        copied = len(self.accelerator.sources)
        views = self.window.stage(self.at)
        assert views.keys() == layer.keys()
        found = names(self.layers, self.accelerator.sources[copied:])
        if self.staged == self.at:  # It is asked for once more.
            assert not found
        else:
            wanted = around(self.layers, self.at, self.ahead + 1)
            while self.coming and self.coming[0] != self.at:
                del self.coming[0]
            assert found == wanted[len(self.coming) :]
            self.staged, self.coming = self.at, wanted[1:]
        for _ in range(reads):
            work = partial(self.read, self.at, views, layer)
            self.accelerator.launch(work, self.accelerator.compute())

    def read(self, number: int, views: Weights, layer: Weights) -> None:
        if found := wrong(views, layer, self.pause):
            self.faults.append((number, found))

    @invariant()
    def every_layer_was_itself(self) -> None:
        assert not getattr(self, "faults", [])

    def teardown(self) -> None:
        if hasattr(self, "accelerator"):
            try:
                self.accelerator.synchronize(self.accelerator.compute())
                assert not self.faults
            finally:
                self.accelerator.close()


def test_passes_that_begin_and_end_anywhere() -> None:
    run_state_machine_as_test(
        Passes,
        settings=settings(
            max_examples=100,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture(params=[Recorded, RecordedAhead])
def accelerator(request: pytest.FixtureRequest) -> Iterator[Recorded]:
    one = request.param(uneven(random.randrange(1 << 32), (0.001, 0.001)))
    yield one
    one.close()


def names(layers: Mapping[int, Weights], tensors: list[torch.Tensor]) -> list[int]:
    """Return the layers of these tensors. A layer appears once for each run of its tensors."""
    of = {id(tensor): number for number, layer in layers.items() for tensor in layer.values()}
    found: list[int] = []
    for tensor in tensors:
        if not found or found[-1] != of[id(tensor)]:
            found.append(of[id(tensor)])
    return found


def around(layers: Mapping[int, Weights], first: int, count: int) -> list[int]:
    """Return `count` layers from `first` on, at most all. The first follows the last."""
    order = [*layers]
    place = order.index(first)
    return (order[place:] + order[:place])[:count]


@pytest.mark.parametrize("ahead", range(5))
def test_a_pass_copies_each_layer_once(accelerator: Recorded, ahead: int) -> None:
    draw = random.Random()
    layers = {number: random_layer(draw) for number in (3, 4, 7, 8)}
    window = PrefetchWindow(accelerator, layers, ahead)
    expected: list[int] = []
    fetched = min(ahead + 1, len(layers))
    for _ in range(3):
        for number in layers:
            views = window.stage(number)
            assert window.stage(number) is views  # It is asked for once more.
            wanted = around(layers, number, fetched)
            # One layer is copied each time, except at the very first.
            expected += wanted[-1:] if expected else wanted
            assert names(layers, accelerator.sources) == expected
            found = list[str]()

            def read(views: Any = views, number: int = number, found: Any = found) -> None:
                found.extend(wrong(views, layers[number], 0))

            accelerator.launch(read, accelerator.compute())
            window.release(number)
            accelerator.synchronize(accelerator.compute())
            assert not found


def test_a_pass_may_begin_with_what_the_last_one_fetched(accelerator: Recorded) -> None:
    layers = {number: random_layer(random.Random()) for number in range(5)}
    window = PrefetchWindow(accelerator, layers, 2)
    window.stage(0)
    window.release(0)
    window.stage(2)
    window.release(2)
    assert names(layers, accelerator.sources) == [0, 1, 2, 3, 4]
    window.stage(4)  # This pass leaves layer 3 out.
    window.release(4)
    assert names(layers, accelerator.sources) == [0, 1, 2, 3, 4, 0, 1]
    window.stage(0)
    assert names(layers, accelerator.sources) == [0, 1, 2, 3, 4, 0, 1, 2]
    window.abort()
    window.stage(1)
    assert names(layers, accelerator.sources) == [0, 1, 2, 3, 4, 0, 1, 2, 1, 2, 3]


@pytest.mark.parametrize("how", ["release", "abort", "begin anew", "go on"])
@pytest.mark.parametrize("ahead", [0, 2])
def test_what_is_being_read_is_not_overwritten(ahead: int, how: str) -> None:
    """This holds whatever ends a layer, and even if its reader has not begun."""
    accelerator, gate = RecordedAhead(), threading.Event()
    layers = {number: random_layer(random.Random()) for number in range(5)}
    window = PrefetchWindow(accelerator, layers, ahead)
    found: list[str] = []
    views = window.stage(2)

    def read() -> None:
        assert gate.wait(30)
        found.extend(wrong(views, layers[2], 0))

    accelerator.launch(read, accelerator.compute())
    if how == "release":
        window.release(2)
    elif how == "abort":
        window.abort()
    for number in (0, 1) if how == "begin anew" else (3, 4):  # This writes all buffers.
        window.stage(number)
    time.sleep(0.02)
    gate.set()
    accelerator.synchronize(accelerator.compute())
    assert not found
    accelerator.close()


def test_memory_that_is_still_in_use_is_not_written() -> None:
    """A buffer may reuse the memory of another tensor whose readers have not run yet."""
    accelerator = RecordedAhead()
    before, gate = torch.full((4096,), 7, dtype=torch.uint8), threading.Event()
    seen: list[bool] = []

    def read() -> None:
        assert gate.wait(30)
        seen.append(bool((before == 7).all()))

    accelerator.launch(read, accelerator.compute())
    accelerator.device_memory = (  # type: ignore[method-assign]
        lambda size, stream: before[:size]
    )
    layers = {0: {"w13": random_tensor((1, 30, 40), torch.uint8)}}
    window = PrefetchWindow(accelerator, layers, 1)
    views = window.stage(0)
    time.sleep(0.05)
    gate.set()
    accelerator.synchronize(accelerator.compute())
    assert seen == [True]
    assert torch.equal(views["w13"], layers[0]["w13"])
    accelerator.close()


def test_tensors_begin_at_multiples_of_256_bytes(accelerator: Recorded) -> None:
    layers = {
        0: {"w13": torch.zeros(257, dtype=torch.uint8), "w2": torch.zeros(0), "b": torch.zeros(1)}
    }
    window = PrefetchWindow(accelerator, layers, 3)
    assert window.staging_bytes == 512 + 256
    views = window.stage(0)
    start = views["w13"].data_ptr()
    assert views["w2"].shape == (0,)
    assert views["b"].data_ptr() - start == 512


def test_no_streamed_layers(accelerator: Recorded) -> None:
    window = PrefetchWindow(accelerator, {}, 2)
    assert window.staging_bytes == accelerator.allocated == 0
    window.abort()
    with pytest.raises(ValueError, match=r"^layer 0 is not streamed; those that are: \[\]$"):
        window.stage(0)


def test_what_is_refused(accelerator: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {n: {"w13": torch.zeros(2, 3), "w2": torch.zeros(3)} for n in (3, 5)}
    with pytest.raises(ValueError, match=r"^ahead is -1, must be at least 0$"):
        PrefetchWindow(accelerator, layers, -1)
    with pytest.raises(ValueError, match=r"^layer 5: w2 is on cpu with strides \(1, 3\), wanted"):
        PrefetchWindow(accelerator, layers | {5: {"w2": torch.zeros(2, 3).T}}, 1)
    window = PrefetchWindow(accelerator, layers, 1)
    with pytest.raises(ValueError, match=r"^layer 4 is not streamed; those that are: \[3, 5\]$"):
        window.stage(4)
    with pytest.raises(RuntimeError, match=r"^layer 3 is released but not staged$"):
        window.release(3)
    window.stage(3)
    with pytest.raises(RuntimeError, match=r"^layer 5 is released but not staged$"):
        window.release(5)
    with pytest.raises(RuntimeError, match=r"^layer 4 is released but not staged$"):
        window.release(4)
    monkeypatch.setattr(accelerator, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"^layer 5 cannot be streamed while a graph is capt"):
        window.stage(5)


def test_no_room_for_the_buffers(accelerator: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int, stream: object) -> torch.Tensor:
        raise MemoryError("of the GPU's 80.00 GiB, 0.10 GiB are free")

    monkeypatch.setattr(accelerator, "device_memory", full)
    layers = {n: {"w13": torch.zeros(100 * (n + 1), dtype=torch.uint8)} for n in range(9)}
    with pytest.raises(MemoryError) as caught:
        PrefetchWindow(accelerator, layers, 2)
    assert str(caught.value) == (
        "LVLLM_GPU_PREFETCH_WINDOW=2 takes 3 buffers on the GPU of 1024 bytes, the largest streamed"
        " layer's: of the GPU's 80.00 GiB, 0.10 GiB are free; a smaller window, or fewer layers in"
        " LVLLM_GPU_RESIDENT_MOE_LAYERS, needs less"
    )


def test_an_error_in_the_copies_does_not_hang(accelerator: Recorded) -> None:
    layers = {number: random_layer(random.Random()) for number in range(4)}
    window = PrefetchWindow(accelerator, layers, 1)
    accelerator.launch(lambda: [][1], window._copies)

    def run() -> None:
        for number in layers:
            window.stage(number)
            window.release(number)
            accelerator.synchronize(accelerator.compute())

    with pytest.raises(RuntimeError, match="list index out of range"):
        run()

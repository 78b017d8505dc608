"""Tests the staging ring: each computation reads exactly its experts, whatever is late."""

import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from lvllm.gpu import groups
from lvllm.gpu.groups import LayerGroups
from lvllm.gpu.ring import StagingRing
from lvllm.units import MIB
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


def random_layer(draw: random.Random, experts: int) -> Weights:
    return {
        name: random_tensor((experts, draw.randint(1, 12), draw.randint(1, 12)), dtype)
        for name, dtype in draw.choice(FORMATS).items()
    }


def random_layers(numbers: Iterable[int], experts: int) -> dict[int, Weights]:
    draw = random.Random(random.getrandbits(32))
    return {number: random_layer(draw, experts) for number in numbers}


def whole(number: int, layer: Weights) -> int:
    """The bytes of a layer in the ring."""
    made = LayerGroups(number, layer)
    return sum(made.size(len(some)) for some in made.divide(range(made.experts)))


def group(number: int, layer: Weights) -> int:
    """The bytes of a layer's largest group."""
    made = LayerGroups(number, layer)
    return made.size(made.most)


def wrong(tensors: Weights, layer: Weights, some: range, pause: float) -> list[str]:
    """Return the names of tensors that do not hold these experts. They are read slowly, twice."""
    wanted = {name: tensor[some.start : some.stop] for name, tensor in layer.items()}
    found = [name for name in wanted if tensors[name].dtype != wanted[name].dtype]
    found += [name for name in wanted if tensors[name].shape != wanted[name].shape]
    for _ in range(2):
        for name, tensor in wanted.items():
            pairs = zip(as_bytes(tensors[name]).chunk(3), as_bytes(tensor).chunk(3), strict=True)
            for got, bytes_wanted in pairs:
                if not torch.equal(got, bytes_wanted):
                    found.append(name)
                time.sleep(pause)
    return found


class Passes(RuleBasedStateMachine):
    """Passes over a model of which some layers are streamed. They begin and end anywhere."""

    @initialize(
        seed=st.integers(0, 1 << 32),
        count=st.integers(1, 7),
        ahead=st.integers(0, 4),
        group_bytes=st.sampled_from((1, 2000, 5000, 1 << 20)),
        room=st.floats(0, 1.2),
        runs_ahead=st.booleans(),
        longest=st.tuples(*[st.sampled_from((0.0, 0.0005, 0.002))] * 2),
        pause=st.sampled_from((0.0, 0.0001)),
    )
    def build(
        self,
        seed: int,
        count: int,
        ahead: int,
        group_bytes: int,
        room: float,
        runs_ahead: bool,
        longest: tuple[float, float],
        pause: float,
    ) -> None:
        self.draw = random.Random(seed)
        self.before, groups.GROUP_BYTES = groups.GROUP_BYTES, group_bytes
        numbers = sorted(self.draw.sample(range(12), count))  # The others are resident.
        self.layers = {
            number: random_layer(self.draw, self.draw.randint(1, 9)) for number in numbers
        }
        self.at = -1
        self.pause = pause
        self.faults: list[tuple[int, range, list[str]]] = []
        kind = RecordedAhead if runs_ahead else Recorded
        self.accelerator = kind(uneven(seed, longest))
        needed = (min(ahead, count - 1) + 1) * max(
            whole(number, layer) for number, layer in self.layers.items()
        )
        two = 2 * max(group(number, layer) for number, layer in self.layers.items())
        limit = max(min(two, needed), int(room * needed))
        self.ring = StagingRing(self.accelerator, self.layers, ahead, limit)
        assert self.ring.staging_bytes == self.accelerator.allocated == min(limit, needed)

    @rule(step=st.sampled_from((1, 1, 1, 1, 1, 1, 2, 3)), busy=st.sampled_from((0.2, 0.7, 1)))
    def compute_on(self, step: int, busy: float) -> None:
        """Compute the next layer, or a later one: a pass may leave layers out."""
        self.at += step
        if self.at >= 12:  # The pass is complete.
            self.at = -1
        else:
            self.compute(busy)

    @rule(at=st.integers(0, 11))
    def begin_anew(self, at: int) -> None:
        """Begin a pass. The pass before ends where it was."""
        self.at = at
        self.compute(1)

    @rule(at=st.integers(0, 11), most=st.integers(0, 3))
    def give_up(self, at: int, most: int) -> None:
        """Fail after some groups of a layer."""
        if at in self.layers:
            counts = [1] * len(next(iter(self.layers[at].values())))
            for _, (some, tensors) in zip(range(most), self.ring.stream(at, counts), strict=False):
                self.launch_read(at, some, tensors)
        self.ring.abort()
        self.at = -1

    @rule()
    def catch_up(self) -> None:
        self.accelerator.synchronize(self.accelerator.compute())

    def compute(self, busy: float) -> None:
        layer = self.layers.get(self.at)
        if layer is None:
            return
        experts = len(next(iter(layer.values())))
        counts = [int(self.draw.random() < busy) * 3 for _ in range(experts)]
        seen: list[int] = []
        for some, tensors in self.ring.stream(self.at, counts):
            assert tensors.keys() == layer.keys()
            assert any(counts[expert] for expert in some)
            seen += some
            self.launch_read(self.at, some, tensors)
        assert seen == sorted(set(seen))
        assert {expert for expert in range(experts) if counts[expert]} <= set(seen)

    def launch_read(self, number: int, some: range, tensors: Weights) -> None:
        work = partial(self.read, number, some, tensors)
        self.accelerator.launch(work, self.accelerator.compute())

    def read(self, number: int, some: range, tensors: Weights) -> None:
        if found := wrong(tensors, self.layers[number], some, self.pause):
            self.faults.append((number, some, found))

    @invariant()
    def every_expert_was_itself(self) -> None:
        assert not getattr(self, "faults", [])

    def teardown(self) -> None:
        if hasattr(self, "accelerator"):
            groups.GROUP_BYTES = self.before
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


@pytest.fixture
def single_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "GROUP_BYTES", 1)


Copied = list[tuple[int, int]]
"""Layers and experts, in the order in which they were copied."""


def copied(layers: Mapping[int, Weights], tensors: Sequence[torch.Tensor]) -> Copied:
    """Which experts these tensors belong to, by where they are. Groups are single experts."""
    of = {
        tensor[expert].data_ptr(): (number, expert)
        for number, layer in layers.items()
        for tensor in layer.values()
        for expert in range(len(tensor))
    }
    found: Copied = []
    for tensor in tensors:
        if not found or found[-1] != of[tensor.data_ptr()]:
            found.append(of[tensor.data_ptr()])
    return found


def run(ring: StagingRing, layer: int, counts: Sequence[int]) -> list[int]:
    return [expert for some, _ in ring.stream(layer, counts) for expert in some]


@pytest.mark.usefixtures("single_experts")
@pytest.mark.parametrize("ahead", range(4))
def test_a_pass_copies_each_expert_once(accelerator: Recorded, ahead: int) -> None:
    layers = random_layers((3, 4, 8), 5)
    ring = StagingRing(accelerator, layers, ahead, 1 << 30)
    order = [(number, expert) for _ in range(5) for number in layers for expert in range(5)]
    steps = min(ahead, 2) + 1
    for place, number in enumerate([*layers] * 3):
        assert run(ring, number, [1] * 5) == [*range(5)]
        # The next layers have been copied, or are being copied.
        assert copied(layers, accelerator.sources) == order[: 5 * (place + steps)]


@pytest.mark.usefixtures("single_experts")
def test_only_experts_with_tokens_are_copied(accelerator: Recorded) -> None:
    layers = random_layers((0, 1), 6)
    ring = StagingRing(accelerator, layers, 0, 1 << 30)
    assert run(ring, 1, [0, 3, 1, 0, 0, 9]) == [1, 2, 5]
    assert run(ring, 0, [0] * 6) == []
    assert copied(layers, accelerator.sources) == [(1, 1), (1, 2), (1, 5)]
    ring = StagingRing(accelerator, layers, 1, 1 << 30)
    accelerator.sources.clear()
    assert run(ring, 0, [0, 0, 0, 0, 1, 0]) == [4]
    # The next layer is copied as a whole, since nobody knows what it needs.
    assert copied(layers, accelerator.sources) == [(0, 4), *((1, expert) for expert in range(6))]
    assert run(ring, 1, [1, 0, 0, 0, 0, 1]) == [0, 5]


@pytest.mark.usefixtures("single_experts")
def test_a_ring_that_is_smaller_than_a_layer(accelerator: Recorded) -> None:
    layers = random_layers((0, 1, 2), 7)
    limit = 3 * max(group(number, layer) for number, layer in layers.items())
    ring = StagingRing(accelerator, layers, 2, limit)
    assert ring.staging_bytes == limit
    for _ in range(2):
        for number, layer in layers.items():
            for some, tensors in ring.stream(number, [1] * 7):
                accelerator.synchronize(accelerator.compute())
                assert not wrong(tensors, layer, some, 0)
    # At least two experts are always being copied ahead, whatever layer they belong to.
    assert len(copied(layers, accelerator.sources)) >= 2 * 21 + 2


@pytest.mark.usefixtures("single_experts")
def test_a_pass_may_begin_with_what_the_last_one_fetched(accelerator: Recorded) -> None:
    layers = random_layers(range(5), 1)
    ring = StagingRing(accelerator, layers, 2, 1 << 30)

    def layers_copied() -> list[int]:
        return [number for number, _ in copied(layers, accelerator.sources)]

    run(ring, 0, [1])
    run(ring, 2, [1])
    assert layers_copied() == [0, 1, 2, 3, 4]
    run(ring, 4, [1])  # This pass leaves layer 3 out.
    assert layers_copied() == [0, 1, 2, 3, 4, 0, 1]
    run(ring, 0, [1])
    assert layers_copied() == [0, 1, 2, 3, 4, 0, 1, 2]
    ring.abort()
    run(ring, 1, [1])
    assert layers_copied() == [0, 1, 2, 3, 4, 0, 1, 2, 1, 2, 3]


@pytest.mark.usefixtures("single_experts")
@pytest.mark.parametrize("how", ["go on", "abort", "begin anew"])
@pytest.mark.parametrize("ahead", [0, 2])
def test_what_is_being_read_is_not_overwritten(ahead: int, how: str) -> None:
    """This holds whatever ends a layer, and even if its reader has not begun."""
    accelerator, gate = RecordedAhead(), threading.Event()
    layers = random_layers(range(5), 2)
    limit = 2 * max(group(number, layer) for number, layer in layers.items())
    ring = StagingRing(accelerator, layers, ahead, limit)
    found: list[str] = []

    def read(some: range, tensors: Weights) -> None:
        assert gate.wait(30)
        found.extend(wrong(tensors, layers[2], some, 0))

    for some, tensors in ring.stream(2, [1, 1]):
        accelerator.launch(partial(read, some, tensors), accelerator.compute())
        if how == "abort":
            break
    if how == "abort":
        ring.abort()
    for number in (0, 1) if how == "begin anew" else (3, 4):  # This writes the whole ring.
        run(ring, number, [1, 1])
    time.sleep(0.02)
    gate.set()
    accelerator.synchronize(accelerator.compute())
    assert not found
    accelerator.close()


def test_memory_that_is_still_in_use_is_not_written() -> None:
    """The ring may reuse the memory of another tensor whose readers have not run yet."""
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
    ring = StagingRing(accelerator, layers, 1, 1 << 20)
    ((_, tensors),) = ring.stream(0, [1])
    time.sleep(0.05)
    gate.set()
    accelerator.synchronize(accelerator.compute())
    assert seen == [True]
    assert torch.equal(tensors["w13"], layers[0]["w13"])
    accelerator.close()


def test_no_streamed_layers(accelerator: Recorded) -> None:
    ring = StagingRing(accelerator, {}, 2, 1 << 20)
    assert ring.staging_bytes == accelerator.allocated == 0
    ring.abort()
    with pytest.raises(ValueError, match=r"^layer 0 is not streamed; those that are: \[\]$"):
        next(ring.stream(0, []))


def test_what_is_refused(accelerator: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {n: {"w13": torch.zeros(2, 3), "w2": torch.zeros(2)} for n in (3, 5)}
    with pytest.raises(ValueError, match=r"^ahead is -1, must be at least 0$"):
        StagingRing(accelerator, layers, -1, 1 << 20)
    ring = StagingRing(accelerator, layers, 1, 1 << 20)
    with pytest.raises(ValueError, match=r"^layer 4 is not streamed; those that are: \[3, 5\]$"):
        next(ring.stream(4, [1, 1]))
    monkeypatch.setattr(accelerator, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"^layer 5 cannot be streamed while a graph is capt"):
        next(ring.stream(5, [1, 1]))


def test_no_room(accelerator: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int, stream: object) -> torch.Tensor:
        raise MemoryError("of the GPU's 80.00 GiB, 0.10 GiB are free")

    layers = {n: {"w13": torch.zeros(4, n << 20, dtype=torch.uint8)} for n in (4, 9)}
    assert StagingRing(accelerator, layers, 1, 1 * MIB).staging_bytes == 2 * 16 * MIB
    monkeypatch.setattr(accelerator, "device_memory", full)
    with pytest.raises(MemoryError) as caught:
        StagingRing(accelerator, layers, 1, 33 * MIB)
    assert str(caught.value) == (
        "copies of experts take 33 MiB on the GPU: of the GPU's 80.00 GiB, 0.10 GiB are free; a"
        " smaller LVLLM_GPU_STAGING_MIB, or fewer layers in LVLLM_GPU_RESIDENT_MOE_LAYERS, needs"
        " less"
    )


def test_an_error_in_the_copies_does_not_hang(accelerator: Recorded) -> None:
    layers = random_layers(range(4), 3)
    ring = StagingRing(accelerator, layers, 1, 1 << 20)
    accelerator.launch(lambda: [][1], ring._copies)

    def compute() -> None:
        for number in layers:
            run(ring, number, [1] * 3)
            accelerator.synchronize(accelerator.compute())

    with pytest.raises(RuntimeError, match="list index out of range"):
        compute()

"""Tests how a batch's experts are divided, and what the divided batch computes."""

from collections.abc import Iterator
from itertools import combinations
from random import randrange

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvllm.gpu.offload import Offload
from lvllm.gpu.shares import Rates, divide, fit
from lvllm.gpu.stand_in import StandInAccelerator
from tests.gpu.streams import uneven
from tests.random_layers import FORMATS, Random, random_layer

COSTS = st.floats(0, 10)


def seconds(counts: list[int], rates: Rates, device: set[int]) -> float:
    """The time until both have ended, if these experts are the device's."""
    rest = [count for expert, count in enumerate(counts) if count and expert not in device]
    cpu = rates.call + sum(rates.read + rates.token * count for count in rest) if rest else 0.0
    return max(rates.copy * len(device), cpu)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=7),
    st.builds(Rates, copy=COSTS, call=COSTS, read=COSTS, token=COSTS),
)
def test_no_other_division_is_faster(counts: list[int], rates: Rates) -> None:
    chosen, found = divide(counts, rates)
    device = {expert for expert, mine in enumerate(chosen) if mine}
    assert all(counts[expert] for expert in device)
    assert found == pytest.approx(seconds(counts, rates, device))
    active = [expert for expert, count in enumerate(counts) if count]
    best = min(
        seconds(counts, rates, set(some))
        for size in range(len(active) + 1)
        for some in combinations(active, size)
    )
    assert found == pytest.approx(best)


@pytest.mark.parametrize("zero", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_rates_are_found_again(zero: tuple[int, ...]) -> None:
    draw = Random(randrange(1 << 30))
    call, read, token = (
        0.0 if place in zero else float(draw.uniform(lowest, 3 * lowest, 1))
        for place, lowest in enumerate((3e-4, 2e-5, 1e-6))
    )
    tokens = [1 << bit for bit in range(12)]
    experts = [128 * (1 - (1 - 8 / 128) ** count) for count in tokens]
    measured = [
        (8 * count, call + read * each + token * 8 * count)
        for count, each in zip(tokens, experts, strict=True)
    ]
    found = fit(5e-5, measured, experts)
    assert found.copy == 5e-5
    for got, want in ((found.call, call), (found.read, read), (found.token, token)):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-10)


def test_times_of_a_machine_that_is_no_line() -> None:
    """Where more tokens seem to take less time, no rate is below 0."""
    rates = fit(1e-5, [(8, 3e-4), (16, 2e-4), (32, 1e-4)], [8, 15, 27])
    assert min(rates.call, rates.read, rates.token) == 0
    assert max(rates.call, rates.read, rates.token) > 0


@pytest.fixture
def accelerator() -> Iterator[StandInAccelerator]:
    accelerator = StandInAccelerator(delay=uneven(randrange(1 << 30), (1e-4, 1e-3)))
    yield accelerator
    accelerator.close()


class Model:
    """Takes the place of what the layers of a model have in common."""


@pytest.mark.parametrize("cached", [0, 4])
def test_a_shared_batch_is_right(accelerator: StandInAccelerator, cached: int) -> None:
    """Layers of all formats, with rates by which the device has all, some or no experts."""
    draw, one = Random(randrange(1 << 30)), Model()
    given = [random_layer(draw, format, 9, 96, 64) for format in FORMATS]
    made = [layer.make(activation_bits=16) for layer in given]
    size = cached * max(layer.tensors["w13"][0].nbytes for layer in made) * 2
    settings = {"threshold": 4, "ahead": 1, "cache_bytes": size}
    joined = [
        Offload.announce(n, one, lambda: Offload(accelerator, 40, **settings))  # type: ignore[arg-type]
        for n in range(len(made))
    ]
    layers = [
        offload.add(n, f"layers.{n}", layer, 3)
        for offload, n, layer in zip(joined, range(len(made)), made, strict=True)
    ]
    for rates in (
        Rates(copy=1, call=0, read=1, token=0),
        Rates(copy=1, call=2, read=0, token=0.3),
        Rates(copy=1, call=9, read=9, token=9),
        Rates(copy=9, call=0, read=1, token=0),
    ):
        for reference, layer in zip(given, layers, strict=True):
            layer.rates = rates
            x = draw.normal(17, 96).bfloat16()
            ids = draw.integers(-1, 9, 17, 3).int()
            weights = draw.uniform(0.1, 1, 17, 3)
            out = torch.ops.lvllm.routed_experts(x, ids, weights, layer.experts.handle)
            want = reference.reference(x.float(), ids, weights)
            # Two parts are rounded to bfloat16, and their sum, and inner sums.
            assert torch.linalg.norm(out.float() - want) <= 0.01 * torch.linalg.norm(want)

"""What the planner says of a cache of experts, against the cache itself."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random as Draw
from random import randrange

import pytest

from lvllm.gpu.cache.expert_cache import open_caches
from lvllm.gpu.packing import expert_bytes, signature
from lvllm.gpu.products import has_whole_words
from lvllm.gpu.stand_in import StandInAccelerator
from lvllm.planning import filling, slots
from lvllm.planning.placement import Load, Placement, memory
from lvllm.worker import expert_cache
from tests.planning.made_up import machine, model
from tests.random_layers import Random, random_layer


@pytest.fixture
def accelerator() -> Iterator[StandInAccelerator]:
    accelerator = StandInAccelerator()
    yield accelerator
    accelerator.close()


@pytest.mark.parametrize("size", ["some", "more than all"])
def test_the_lane_has_as_many_slots_as_the_plan_says(
    accelerator: StandInAccelerator, size: str
) -> None:
    draw, random = Draw(randrange(1 << 30)), Random(randrange(1 << 30))
    layers, experts = draw.randint(1, 3), draw.randint(2, 40)
    hidden, inner = 64 * draw.randint(1, 4), 64 * draw.randint(1, 4)
    resident = draw.randint(0, 2)
    made = {n: random_layer(random, "bf16", experts, hidden, inner).make() for n in range(layers)}
    each = expert_bytes(signature(made[0].tensors))
    of = replace(model(layers + resident, 0, experts, 1, 3 * hidden * inner), hidden=hidden)
    budget = each * draw.uniform(1, layers * experts + 0.5 if size == "some" else 1e4)
    how = Placement(True, resident=resident, cache=budget)
    planned = how.cached_experts(of, cards=1)
    (cache,) = open_caches(accelerator, made, int(budget))
    held = [cache.holds(n) for n in made]
    assert planned == sum(sum(of_layer) for of_layer in held if of_layer is not None)
    load = Load(batch=draw.randint(1, 100))
    taken = memory(of, machine(gpus=1), how, load).card["cached experts"]
    tables = 2 * 4 * layers * experts
    sums = 4 * load.batch * hidden
    assert taken == pytest.approx(planned * each + tables + sums + expert_cache.SCRATCH)
    # Each of an expert's tensors is aligned once.
    assert 0 <= cache.nbytes - planned * each < 256 * len(made[0].tensors)


def test_the_plan_keeps_what_the_worker_keeps() -> None:
    assert filling.KV_SHARE == 1 / expert_cache.SHARE
    assert slots.SCRATCH == expert_cache.SCRATCH


@pytest.mark.parametrize("format", ["bf16", "fp8", "int8", "int4", "mxfp4"])
def test_experts_without_kernels_are_known(format: str) -> None:
    """Rows of an odd number of bytes have none, and their products would stop a graph's capture."""
    draw, random = Draw(randrange(1 << 30)), Random(randrange(1 << 30))
    found = set()
    for number in range(12):
        hidden, inner = (32 * draw.randint(1, 3) for _ in range(2))
        if format == "bf16":  # Every fourth layer has an even number of both.
            hidden, inner = (2 * draw.randint(3, 20) + bit for bit in (number & 1, number >> 1 & 1))
        layer = random_layer(random, format, 2, hidden, inner).make()
        of = model(2, 0, 2, 1, 3 * hidden * inner, format=format)
        of = replace(of, hidden=hidden, rows=inner)
        assert slots.has_kernels(of, [format], 1) == has_whole_words(layer)
        found.add(has_whole_words(layer))
    assert format != "bf16" or found == {False, True}


def test_cards_divide_the_rows() -> None:
    of = replace(model(), rows=768)
    assert slots.has_kernels(of, ["int4"], 2)
    assert not slots.has_kernels(of, ["q4_k"], 2)  # 384 are no whole blocks of 256.
    assert slots.has_kernels(of, ["q4_k"], 1)

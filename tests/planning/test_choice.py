"""Which way is taken."""

from dataclasses import replace
from random import randrange, uniform

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvllm.planning.choice import cache_of, choose
from lvllm.planning.filling import Given
from lvllm.planning.machine import GPUS
from lvllm.planning.placement import Load, Placement, memory
from lvllm.planning.settings import settings_of
from lvllm.planning.speed import predict
from lvllm.settings.use_weight import UseWeight
from lvllm.units import GIB
from tests.planning.made_up import machine, model

MODEL = model()
MACHINES = st.builds(
    machine,
    gib=st.floats(2, 100),
    gb_per_s=st.floats(10, 1000),
    cores=st.integers(1, 200),
    isa=st.sampled_from(["avx2", "avx512_vnni", "amx"]),
    gpus=st.integers(0, 4),
    gpu=st.sampled_from(sorted(GPUS)),
)
LOADS = st.builds(
    Load,
    prompt=st.integers(1, 20000),
    answer=st.integers(1, 2000),
    users=st.integers(1, 64),
    context=st.just(32768),
)


@given(MACHINES, LOADS)
def test_the_best_is_never_slower_than_cpu_alone_or_streaming_alone(here, load) -> None:  # type: ignore[no-untyped-def]
    best = choose(MODEL, here, load).best
    simple = [Placement(False)]
    if here.gpus:
        simple.append(Placement(True, streamed_from=1))
    for how in simple:
        for batch in (2048, 8192):
            one = replace(load, batch=batch)
            if memory(MODEL, here, how, one).lacks is None and (how.on_gpu or batch == 2048):
                assert best is not None
                assert best.seconds <= predict(MODEL, here, how, one).seconds(one)
    if best is not None:
        assert memory(MODEL, here, best.how, best.load).lacks is None


@given(MACHINES, LOADS, st.floats(1, 10))
def test_faster_memory_is_never_slower(here, load, factor) -> None:  # type: ignore[no-untyped-def]
    faster = here.model_copy(update={"read_gb_per_s": here.read_gb_per_s * factor})
    before, after = choose(MODEL, here, load).best, choose(MODEL, faster, load).best
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        assert after.seconds <= before.seconds * (1 + 1e-9)


def test_a_gpu_is_filled_with_layers_and_no_further() -> None:
    here = machine(gpus=1, gpu_gib=12)
    best = choose(MODEL, here, Load(), given=Given(cache=0.0)).best
    assert best is not None
    assert best.how.on_gpu
    assert 0 < best.how.resident < 7
    more = replace(best.how, resident=best.how.resident + 1)
    assert memory(MODEL, here, more, best.load).card_lacks


def test_a_model_that_fits_on_the_gpu_is_not_offloaded() -> None:
    best = choose(MODEL, machine(gpus=1, gpu="h100"), Load()).best
    assert best is not None
    assert best.name == "everything on the GPU"
    assert best.memory.host.get("experts") == 0


def test_long_prompts_are_streamed_where_the_cpu_is_slow() -> None:
    slow = machine(gpus=1, gpu="h100", gpu_gib=12, cores=2, isa="avx2", gb_per_s=100)
    best = choose(MODEL, slow, Load(prompt=16384, answer=16, context=32768)).best
    assert best is not None
    assert best.how.streamed_from is not None
    # One token does not pay for copying 64 experts, of which it takes 6.
    answers = choose(MODEL, slow, Load(prompt=16, answer=1000)).best
    assert answers is not None
    assert answers.how.streamed_from is None or answers.how.streamed_from > 1


@pytest.mark.parametrize(
    ("heads", "rows", "gpus", "used"),
    [
        ((32, 4), 768, 3, 2),
        ((32, 4), 768, 7, 4),
        ((32, 4), 768, 8, 8),
        ((24, 3), 96, 3, 3),
        ((24, 3), 100, 3, 1),
        ((64, 8), 1408, 6, 4),
        (None, None, 5, 5),
    ],
)
def test_only_as_many_cards_are_used_as_divide_the_model(
    heads: tuple[int, int] | None, rows: int | None, gpus: int, used: int
) -> None:
    """A plan for 3 cards would not start where only 2 divide the attention heads."""
    of = replace(model(), heads=heads, rows=rows)
    found, wanted = (choose(of, machine(gpus=n, gpu_gib=8), Load()) for n in (gpus, used))
    assert found.candidates == wanted.candidates
    best = next(one for one in found.candidates if one.how.on_gpu)
    told = {one.key: one for one in settings_of(of, found.machine, best)}["tensor-parallel-size"]
    assert told.value == used
    assert ("do not divide" in told.why) == (used < gpus)


BIG = model(layers=24, experts=128, chosen=8)
"""The experts take 55 GiB."""


def test_the_most_used_experts_are_cached_where_not_all_layers_fit() -> None:
    here = machine(gib=128, gpus=1)
    plan = choose(BIG, here, Load())
    best = plan.best
    assert best is not None
    assert best.how.cache > 0
    assert best.how.resident == 0
    layers = choose(BIG, here, Load(), given=Given(cache=0.0)).best
    assert layers is not None
    assert layers.how.resident > 0
    assert best.speed.decode_rate > 1.5 * layers.speed.decode_rate
    assert choose(BIG, machine(gib=128, gpus=4), Load()).best.name == "everything on the GPU"  # type: ignore[union-attr]


@given(MACHINES, LOADS)
def test_a_cache_is_only_chosen_where_it_is_faster_and_fits(here, load) -> None:  # type: ignore[no-untyped-def]
    here = here.model_copy(update={"memory_bytes": 256 * GIB})
    plan = choose(BIG, here, load)
    best, without = plan.best, choose(BIG, here, load, given=Given(cache=0.0)).best
    assert best is not None
    assert without is not None
    assert best.seconds <= without.seconds
    if not best.how.cache:
        assert best.seconds == without.seconds
    for one in plan.candidates:
        if one.how.cache and here.gpu:
            assert (cache_of(plan, one) is not None) == (one.how.resident < len(BIG.moe_layers))
            assert one.memory.card_lacks is None
            assert without.name != "everything on the GPU"
            # vLLM measures what is left for its KV cache, and gives it all of that.
            card = one.memory.card
            left = 0.9 * here.gpu.memory_bytes - sum(card.values()) + card["KV cache"]
            assert left >= card["KV cache"] * 9 / 8
            assert left >= (left + one.how.cache) / 4


def test_a_few_large_experts_are_only_cached_if_the_user_says_so() -> None:
    """Nothing is known of how unevenly they are read, so whole layers are as good."""
    few, here = model(layers=24, experts=8, chosen=2, expert=160_000_000), machine(gib=128, gpus=1)
    plan = choose(few, here, Load())
    assert not any(one.how.cache for one in plan.candidates)
    assert any(one.how.resident for one in plan.candidates)
    own = choose(few, here, Load(), given=Given(cache="auto")).best
    assert own is not None
    assert own.how.cache > 0


def test_a_host_that_is_too_small_for_all_experts_has_whole_layers_on_the_gpu() -> None:
    """The host keeps the cache's experts, and gives away those of resident layers."""
    best = choose(BIG, machine(gib=50, gpus=1), Load()).best
    assert best is not None
    assert best.how.resident
    assert not best.how.cache


def test_experts_for_which_there_are_no_kernels_are_not_cached() -> None:
    plan = choose(replace(BIG, rows=767), machine(gib=128, gpus=1), Load())
    assert not any(one.how.cache for one in plan.candidates)


@pytest.mark.parametrize("streamed", [None, (None,), (64,)])
def test_what_the_user_decided_is_kept(streamed: tuple[int | None, ...] | None) -> None:
    here, resident, cache = machine(gib=128, gpus=1), randrange(1, 5), uniform(1, 3) * GIB
    for decided in (
        Given(resident, None, streamed),
        Given(None, cache, streamed),
        Given(resident, cache, streamed),
        Given(resident, "auto", streamed),
    ):
        plan = choose(BIG, here, Load(), given=decided)
        ways = [one for one in plan.candidates if one.how.on_gpu]
        assert ways
        for one in ways:
            assert decided.resident in (None, one.how.resident)
            assert decided.cache in (None, "auto", one.how.cache)
            assert streamed is None or one.how.streamed_from in streamed
        best = plan.best
        assert best is not None
        assert best.memory.lacks is None
        assert best.how.cache > 0
    # A layer is left for a cache that the user gave, even if all fit.
    best = choose(MODEL, machine(gpus=1), Load(), given=Given(cache=float(GIB))).best
    assert best is not None
    assert best.how.resident < len(MODEL.moe_layers)


def test_what_does_not_fit_says_why() -> None:
    plan = choose(MODEL, machine(gib=4, gpus=1, gpu_gib=4), Load())
    assert plan.best is None
    assert all(one.memory.lacks for one in plan.candidates)
    assert "the host would hold" in str(plan.candidates[0].memory.lacks)


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("allowed", [(), ("INT4",), ("INT8",), ("FP8",), ("FP8", "INT4", "INT8")])
def test_weights_are_rounded_only_if_allowed(allowed: tuple[str, ...], gpus: int) -> None:
    """Of several formats the fastest is taken; here memory is the limit, so fewer bits are."""
    experts = [UseWeight.KEEP, *map(UseWeight, allowed)]
    here = machine(gpus=gpus, gpu_gib=8)
    plan = choose(MODEL, here, Load(), experts=experts, int8_linear=bool(allowed))
    assert plan.best is not None
    assert plan.best.how.use_weight == ("INT4" if "INT4" in allowed else experts[-1])
    assert plan.best.how.int8_linear == (bool(allowed) and not gpus)


def test_what_fits_in_8_bits_only() -> None:
    """The experts take 8.3 GiB in 16 bits, and half of it in 8."""
    assert choose(MODEL, machine(gib=10), Load()).best is None
    for use in (UseWeight.INT8, UseWeight.FP8):
        best = choose(MODEL, machine(gib=10), Load(), experts=[UseWeight.KEEP, use]).best
        assert best is not None
        assert best.how.use_weight == use

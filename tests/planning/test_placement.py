"""Where bytes lie."""

from dataclasses import replace
from random import random, randrange

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvllm.planning.bits import FormatShare
from lvllm.planning.placement import Load, Placement, memory
from lvllm.settings.use_weight import UseWeight
from lvllm.units import GIB, MIB
from tests.planning.made_up import machine, model

MODEL = model()  # 7 layers of 64 experts with 10 million weights in 16 bits: 8.96 GB
LAYER = 64 * 10_000_000 * 2
OTHERS = (8 * 30_000_000 + 200_000_000) * 2


def test_without_a_gpu_everything_is_on_the_host() -> None:
    load = Load(users=4, context=1000)
    needs = memory(MODEL, machine(nodes=4), Placement(False), load)
    assert needs.card == {}
    assert needs.host["experts"] == 7 * LAYER
    assert needs.host["other weights"] == OTHERS
    assert needs.host["KV cache"] == 4 * 1000 * 8 * 1024 * 2
    assert needs.node["experts"] == 7 * LAYER / 4
    assert needs.lacks is None


def test_with_gpus_the_experts_are_divided() -> None:
    how = Placement(True, resident=2, streamed_from=512)
    needs = memory(MODEL, machine(gpus=2), how, Load())
    assert needs.card["experts"] == 2 * LAYER / 2
    assert needs.card["other weights"] == OTHERS / 2
    assert needs.card["staging"] == GIB  # two layers on two cards would take more
    assert needs.host["experts"] == 5 * LAYER
    assert memory(MODEL, machine(gpus=2), Placement(True), Load()).card["staging"] == 0


# An expert of 2048 x 768 has 1536 rows in w13 and 2048 in w2, each with a scale of 32 bits.
BY_ROWS = 8 + 32 * (1536 + 2048) / (3 * 2048 * 768)


@pytest.mark.parametrize(
    ("use", "format", "bits", "experts", "becomes"),
    [
        ("INT4", "bf16", 16, 4.5, "int4"),
        ("INT4", "fp8", 8.125, 4.5, "int4"),
        ("INT4", "mxfp4", 4.25, 4.25, "mxfp4"),
        ("INT8", "bf16", 16, BY_ROWS, "int8"),
        ("FP8", "fp16", 16, BY_ROWS, "fp8"),
        ("FP8", "int8", 8.125, 8.125, "int8"),
        ("INT8", "int4", 4.125, 4.125, "int4"),
        ("INT4", "q4_k", 4.5, 4.5, "q4_k"),
        ("INT4", "q6_k", 6.5625, 4.5, "int4"),
        ("KEEP", "bf16", 16, 16, "bf16"),
    ],
)
def test_rounding_only_shrinks(
    use: str, format: str, bits: float, experts: float, becomes: str
) -> None:
    small = model(expert=3 * 2048 * 768, bits=bits, format=format)
    how = Placement(False, use_weight=UseWeight(use))
    needs = memory(small, machine(), how, Load())
    assert needs.host["experts"] == pytest.approx(small.routed * experts / 8)
    assert how.expert_parts(small) == (FormatShare(becomes, 1, how.expert_bits(small)),)


@given(
    st.floats(1, 200),
    st.integers(0, 4),
    st.integers(0, 7),
    st.sampled_from([None, 1, 512]),
    st.floats(0, 30),
)
def test_what_lacks_is_what_does_not_fit(
    gib: float, gpus: int, resident: int, streamed: int | None, cache: float
) -> None:
    here = machine(gib=gib, gpus=gpus)
    on_gpu = gpus > 0
    how = Placement(False)
    if on_gpu:
        how = Placement(True, resident, streamed, cache=cache * GIB)
    needs = memory(MODEL, here, how, Load())
    assert (needs.host_lacks is None) == (sum(needs.host.values()) <= gib * GIB)
    usable = 0.9 * 24 * GIB if on_gpu else 0
    assert (needs.card_lacks is None) == (sum(needs.card.values()) <= usable)
    # The host has the experts of the cache, too.
    total = needs.host["experts"] + gpus * needs.card.get("experts", 0)
    assert total == pytest.approx(7 * LAYER)


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_a_cache_takes_whole_experts_of_each_card(gpus: int) -> None:
    """Each card has its part of an expert, and more slots than experts are not made."""
    each, resident = 10_000_000 * 2 / gpus, randrange(7)
    slots = randrange(1, (7 - resident) * 64)
    how = Placement(True, resident, cache=each * (slots + random()))
    needs = memory(MODEL, machine(gpus=gpus), how, Load())
    assert how.cached_experts(MODEL, gpus) == slots
    assert how.cached_share(MODEL, gpus) == slots / ((7 - resident) * 64)
    assert needs.card["cached experts"] - slots * each == pytest.approx(272 * MIB, rel=0.05)
    whole = replace(how, cache=1000 * GIB)
    assert whole.cached_share(MODEL, gpus) == 1
    assert replace(how, resident=7).cached_share(MODEL, gpus) == 0
    too_small = replace(how, cache=each / 2)
    assert memory(MODEL, machine(gpus=gpus), too_small, Load()).card["cached experts"] == 0
    lacks = memory(MODEL, machine(gpus=gpus), whole, Load(users=256, context=32768)).card_lacks
    assert "are for the cache of experts" in str(lacks)

"""Where bytes lie."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvllm.planning.placement import Load, Placement, memory
from lvllm.units import GIB
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


@pytest.mark.parametrize(("int4", "bits", "experts"), [(True, 16, 4.5), (True, 4.25, 4.25)])
def test_rounding_only_shrinks(int4: bool, bits: float, experts: float) -> None:
    small = model(bits=bits, format="mxfp4" if bits < 8 else "bf16")
    needs = memory(small, machine(), Placement(False, int4=int4), Load())
    assert needs.host["experts"] == pytest.approx(7 * 64 * 10_000_000 * experts / 8)


@given(st.floats(1, 200), st.integers(0, 4), st.integers(0, 7), st.sampled_from([None, 1, 512]))
def test_what_lacks_is_what_does_not_fit(
    gib: float, gpus: int, resident: int, streamed: int | None
) -> None:
    here = machine(gib=gib, gpus=gpus)
    on_gpu = gpus > 0
    how = Placement(on_gpu, resident if on_gpu else 0, streamed if on_gpu else None)
    needs = memory(MODEL, here, how, Load())
    assert (needs.host_lacks is None) == (sum(needs.host.values()) <= gib * GIB)
    usable = 0.9 * 24 * GIB if on_gpu else 0
    assert (needs.card_lacks is None) == (sum(needs.card.values()) <= usable)
    total = sum(needs.host["experts"] + gpus * needs.card.get("experts", 0) for _ in range(1))
    assert total == pytest.approx(7 * LAYER)

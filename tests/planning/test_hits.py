"""The share of reads that a cache of experts is taken to save."""

from random import Random, randrange

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvllm.planning.hits import EVEN, EXPERTS, FEWEST, SHARES, SKEWED, saved, saved_reads
from tests.planning.made_up import model

LAYERS = st.builds(
    lambda experts, chosen: model(experts=experts, chosen=min(chosen, experts)).moe_layers[0],
    experts=st.integers(2, 512),
    chosen=st.integers(1, 16),
)


@given(LAYERS, st.integers(1, 5000), st.floats(0, 1), st.floats(0, 1))
def test_a_cache_saves_at_least_its_share_and_no_more_than_all(layer, tokens, one, other) -> None:  # type: ignore[no-untyped-def]
    small, large = sorted((one, other))
    low, high = saved_reads(layer, tokens, small), saved_reads(layer, tokens, large)
    assert small - 1e-9 <= low <= high + 1e-9
    assert high <= 1
    if layer.experts < FEWEST:
        assert low == small


@given(LAYERS, st.integers(1, 500), st.integers(1, 500), st.floats(0, 1))
def test_more_tokens_never_save_more(layer, tokens, more, share) -> None:  # type: ignore[no-untyped-def]
    assert saved_reads(layer, tokens + more, share) <= saved_reads(layer, tokens, share) + 1e-9


def test_the_simulated_points_are_met() -> None:
    """A user of the simulation takes 8 of 128 experts."""
    layer = model(experts=EXPERTS, chosen=8).moe_layers[0]
    for users, points in EVEN.items():
        for share, hits in zip(SHARES, points, strict=True):
            assert saved(share, users) == hits
            assert saved_reads(layer, users, share) == pytest.approx(hits)
    draw = Random(randrange(1 << 30))
    middle = draw.uniform(*SHARES[2:4])
    assert EVEN[1][2] < saved(middle, 1) < EVEN[1][3]


def test_a_token_of_more_experts_counts_as_more_users() -> None:
    """16 of 128 experts are nearly those of two users, who take one by both now and then."""
    twice = model(experts=EXPERTS, chosen=16).moe_layers[0]
    assert saved_reads(twice, 1, 1 / 4) == EVEN[4][3]
    half = model(experts=EXPERTS, chosen=4).moe_layers[0]
    assert saved_reads(half, 2, 1 / 4) == EVEN[1][3]


def test_the_plan_takes_the_more_even_routing() -> None:
    for users in EVEN:
        assert all(even <= skewed for even, skewed in zip(EVEN[users], SKEWED[users], strict=True))

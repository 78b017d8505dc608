"""Tests the simulation of a cache of experts."""

import pytest
import torch

from benchmarks.expert_cache.curves import COVERED, covering, even_skew, simulated
from benchmarks.expert_cache.routing import distinct, fitted_skew, made_up
from benchmarks.expert_cache.schemes import SCHEMES
from lvllm.planning.hits import EVEN, EXPERTS, SKEWED


def test_made_up_routing_chooses_as_many_experts_as_it_is_fitted_to() -> None:
    skew = fitted_skew(32, 4, 64, 20)
    assert distinct(32, 4, skew, 64, 1) == pytest.approx(20, abs=0.5)
    trace = list(made_up(3, 32, 4, skew, users=2, steps=20, seed=5))
    assert len(trace) == 20
    for read in trace:
        assert read.shape == (3, 32)
        assert ((read.sum(1) >= 4) & (read.sum(1) <= 8)).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_counts_the_reads_of_its_experts(name: str) -> None:
    """Expert 0 of layer 0 and expert 1 of layer 1 are read in every step, expert 2 in one of 4."""
    trace = []
    for step in range(400):
        read = torch.zeros(2, 4, dtype=torch.bool)
        read[0, 0] = read[1, 1] = True
        read[:, 2] = step % 4 == 0
        trace.append(read)
    share = SCHEMES[name](trace, 4)
    best = {"whole layers": 0.5}.get(name, 1.0)
    assert share == pytest.approx(best)


def test_the_even_skew_is_the_published_one() -> None:
    trace = list(made_up(6, EXPERTS, 8, even_skew(), 1, 1000, 2))
    assert covering(trace, 0.9) == pytest.approx(COVERED, abs=3)


@pytest.mark.parametrize("users", [1, 8])
def test_the_planner_has_what_is_simulated(users: int) -> None:
    for skew, curves in (("even", EVEN), ("skewed", SKEWED)):
        said = "python -m benchmarks.expert_cache.curves prints lvllm/planning/hits.py"
        assert simulated(skew, users) == pytest.approx(curves[users], abs=6e-4), said

"""Likelihoods and divergences, compared with float64 on whole random distributions."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from lvllm.evaluation import likelihood
from lvllm.evaluation.likelihood import Likelihoods, compare

VOCABULARY = 61

Logprobs = NDArray[np.float64]


@pytest.fixture
def seed() -> int:
    drawn = random.randrange(1 << 30)
    print(f"seed {drawn}")
    return drawn


def distributions(rows: int, seed: int, apart: float = 0.3) -> tuple[Logprobs, Logprobs]:
    """Two sets of log-probabilities [rows, VOCABULARY]. The second is near the first."""
    draw = np.random.default_rng(seed)
    logits = 3 * draw.standard_normal((rows, VOCABULARY))
    other = logits + apart * draw.standard_normal((rows, VOCABULARY))
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (logits, other))
    return p, q


def listed(logprobs: Logprobs, top: int, vocabulary: int | None = VOCABULARY) -> Likelihoods:
    """The log-probabilities as a model gives them. The text's own token is always number 2."""
    best = np.argsort(-logprobs, axis=1)[:, :top]
    return Likelihoods(
        logprobs[:, 2].astype(np.float32),
        best.astype(np.int32),
        np.take_along_axis(logprobs, best, 1).astype(np.float32),
        vocabulary,
    )


def kl(p: Logprobs, q: Logprobs) -> float:
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def test_nll_and_perplexity(seed: int) -> None:
    p, _ = distributions(300, seed)
    found = listed(p, 1)
    assert found.nll == pytest.approx(-p[:, 2].mean(), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(-p[:, 2].mean()), rel=1e-5)


@pytest.mark.parametrize("block", [7, 1000])
def test_the_whole_vocabulary_gives_the_divergence_exactly(
    seed: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "ROWS", block)
    p, q = distributions(100, seed)
    found = compare(listed(p, VOCABULARY), listed(q, VOCABULARY))
    assert found.exact
    assert found.covered == pytest.approx(1, abs=1e-5)
    # Each log-probability, at most about 20, is rounded to float32 with a relative error of 6e-8.
    assert found.divergence == pytest.approx(kl(p, q), abs=5e-6)
    assert found.agreement == (p.argmax(1) == q.argmax(1)).mean()


def test_a_list_gives_the_divergence_less_that_among_the_others(seed: int) -> None:
    """The chain rule: KL is that of the lumped distributions and, by the probability that was
    lumped, that within the lump.
    """
    p, q = distributions(50, seed)
    for top in (1, 5, 20, 60):
        within = np.zeros(len(p))
        for row in range(len(p)):
            both = set(np.argsort(-p[row])[:top]) & set(np.argsort(-q[row])[:top])
            rest = [i for i in range(VOCABULARY) if i not in both]
            lump = np.exp(p[row, rest]).sum()
            inner_p = p[row, rest] - math.log(lump)
            inner_q = q[row, rest] - math.log(np.exp(q[row, rest]).sum())
            within[row] = lump * (np.exp(inner_p) * (inner_p - inner_q)).sum()
        found = compare(listed(p, top), listed(q, top))
        assert not found.exact
        assert found.listed == top
        assert found.divergence == pytest.approx(kl(p, q) - within.mean(), abs=2e-5)


def test_a_longer_list_never_lowers_the_bound(seed: int) -> None:
    p, q = distributions(80, seed, apart=1.0)
    bounds = [
        compare(listed(p, top), listed(q, top)).divergence for top in range(1, VOCABULARY + 1)
    ]
    assert all(a <= b + 1e-5 for a, b in pairwise(bounds))
    assert bounds[-1] <= kl(p, q) + 1e-5


def test_two_lists_that_share_nothing_say_nothing() -> None:
    p = np.log(np.array([[0.8, 0.1, 0.1]]))
    found = compare(listed(p, 1, 3), listed(np.roll(p, 1), 1, 3))
    assert found.divergence == 0
    assert found.covered == 0
    assert found.agreement == 0


def test_a_model_equals_itself(seed: int) -> None:
    p, _ = distributions(30, seed)
    for top in (3, VOCABULARY):
        found = compare(listed(p, top), listed(p, top))
        assert found.divergence == 0
        assert found.agreement == 1


def test_impossible_tokens_add_nothing() -> None:
    p = np.array([[0.0, -np.inf, -np.inf]])
    q = np.log(np.array([[0.5, 0.25, 0.25]]))
    assert compare(listed(p, 3, 3), listed(q, 3, 3)).divergence == pytest.approx(math.log(2))


def test_what_cannot_be_compared_is_refused(seed: int) -> None:
    p, _ = distributions(4, seed)
    with pytest.raises(ValueError, match="vocabulary of 61 tokens, the model one of 62"):
        compare(listed(p, 3), listed(p, 3, 62))
    with pytest.raises(ValueError, match="scored 4 tokens, the model 3"):
        compare(listed(p, 3), listed(p[:3], 3))
    compare(listed(p, 3), listed(p, 3, None))  # A server that does not say how many.

"""The probabilities that a model gives to a text's tokens, and how far two models differ in them.

N tokens are scored. For each place the K most probable tokens are known; if K is the size of the
vocabulary, that is the whole distribution. All values are natural logarithms (nats).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-6
"""The error of a sum of up to K float32 probabilities, and so of what is left of 1."""
ROWS = 2048
"""How many tokens are compared at a time, which bounds the memory."""


@dataclass(frozen=True)
class Likelihoods:
    """Log-probabilities of the scored tokens, and of the most probable tokens in their places."""

    logprobs: NDArray[np.float32]
    """[N], for the text's own tokens."""
    top_ids: NDArray[np.int32]
    """[N, K], most probable first."""
    top_logprobs: NDArray[np.float32]
    """[N, K]."""
    vocabulary: int | None = None
    """The size of the vocabulary; None if a server did not say."""

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a token."""
        return -float(self.logprobs.mean(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700))

    @property
    def whole(self) -> bool:
        """Whether the whole vocabulary is listed."""
        return self.top_ids.shape[1] == self.vocabulary


@dataclass(frozen=True)
class Comparison:
    """How far a model is from its reference."""

    agreement: float
    """In what share of the places both have the same most probable token."""
    divergences: NDArray[np.float64]
    """[N]: KL divergence of the model from the reference. It is a lower bound unless `exact`."""
    exact: bool
    listed: int
    """How many tokens were compared one by one in a place, at most."""
    covered: float
    """The share of the reference's probability that these tokens have, on average."""

    @property
    def divergence(self) -> float:
        """The mean of `divergences`."""
        return float(self.divergences.mean())


def compare(reference: Likelihoods, model: Likelihoods) -> Comparison:
    """KL(reference || model) and the agreement, over the tokens that both have scored.

    If one of the two lists only its K most probable tokens, the tokens that both list are compared
    one by one. All others count as one token, with the probability that is left. That can only make
    the divergence smaller (by the data processing inequality).

    Raises ValueError if the two have different vocabularies or numbers of tokens.
    """
    check_vocabularies(reference.vocabulary, model.vocabulary)
    if len(reference.logprobs) != len(model.logprobs):
        raise ValueError(
            f"the reference scored {len(reference.logprobs)} tokens, the model"
            f" {len(model.logprobs)}"
        )
    exact = reference.whole and model.whole
    blocks = [
        _divergence(reference, model, slice(start, start + ROWS), exact)
        for start in range(0, len(model.logprobs), ROWS)
    ]
    return Comparison(
        agreement=float(np.mean(reference.top_ids[:, 0] == model.top_ids[:, 0])),
        divergences=np.concatenate([block[0] for block in blocks]),
        exact=exact,
        listed=min(reference.top_ids.shape[1], model.top_ids.shape[1]),
        covered=float(np.concatenate([block[1] for block in blocks]).mean()),
    )


def check_vocabularies(reference: int | None, model: int | None) -> None:
    """Raises ValueError if two sizes of a vocabulary are known and differ."""
    if reference is not None and model is not None and reference != model:
        raise ValueError(
            f"the reference has a vocabulary of {reference} tokens, the model one of {model}"
        )


def _divergence(
    reference: Likelihoods, model: Likelihoods, rows: slice, exact: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The divergence in each place, and the reference's probability of the tokens compared."""
    theirs, ours = reference.top_ids[rows], model.top_ids[rows]
    count = len(theirs)
    # The row is made part of a token's number, so that one intersection serves all rows.
    width = 1 + int(max(theirs.max(), ours.max()))
    row_starts = np.arange(count, dtype=np.int64)[:, None] * width
    common, at_reference, at_model = np.intersect1d(
        (row_starts + theirs).ravel(),
        (row_starts + ours).ravel(),
        assume_unique=True,
        return_indices=True,
    )
    row = common // width
    log_p = reference.top_logprobs[rows].ravel()[at_reference].astype(np.float64)
    log_q = model.top_logprobs[rows].ravel()[at_model].astype(np.float64)
    p, q = np.exp(log_p), np.exp(log_q)
    possible = p > 0  # An impossible token adds nothing, whatever its logarithm is.
    terms = np.zeros_like(p)
    terms[possible] = p[possible] * (log_p[possible] - log_q[possible])
    divergence: NDArray[np.float64] = np.bincount(row, terms, count).astype(np.float64)
    covered: NDArray[np.float64] = np.bincount(row, p, count).astype(np.float64)
    if not exact:
        rest_p = np.maximum(1 - covered, ROUNDING)
        rest_q = np.maximum(1 - np.bincount(row, q, count), ROUNDING)
        divergence += rest_p * np.log(rest_p / rest_q)
    return divergence, covered

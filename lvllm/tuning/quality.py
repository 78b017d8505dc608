"""What settings cost in quality: how far the model is from the same model with the plan's settings.

The plan's server samples answers, and both servers say how probable each of their tokens is. So the
text is the model's own, whatever languages and formats it knows.
"""

import hashlib

import httpx
import numpy as np

from lvllm.bench.load import Endpoint
from lvllm.evaluation.errors import EvaluationError
from lvllm.evaluation.likelihood import Comparison, Likelihoods, compare
from lvllm.evaluation.logprobs import logprobs_from_server
from lvllm.evaluation.passages import Passages

__all__ = ["Quality"]

OPENINGS = (
    "The history of the city begins",
    "Q: How does a refrigerator work?\nA:",
    "def quicksort(items):\n",
    "Dear colleagues,\n\nI am writing to",
    "In this paper, we show that",
    "Zutaten für einen Apfelkuchen:",
    "人工智能的发展",
    "<!DOCTYPE html>\n<html>",
)
TOKENS = 128
"""Of each answer. 8 x 128 tokens tell a divergence of 0.01 nats to some 20%."""
TOP = 20
"""So many of the most probable tokens are compared in each place; a server allows no more unless
it is told to."""


class Quality:
    """Asks the plan's server, and then the one with other settings."""

    def __init__(self) -> None:
        self._passages: Passages | None = None
        self._reference: Likelihoods | None = None
        self._other: Likelihoods | None = None

    def ask(self, to: Endpoint, *, plan: bool) -> None:
        """Ask a server, unless one like it was asked before. The plan's server comes first.

        Raises EvaluationError if it does not answer as vLLM does.
        """
        if plan and self._passages is None:
            self._passages = _sample(to)
            self._reference = _likelihoods(to, self._passages)
        elif not plan and self._other is None and self._passages is not None:
            self._other = _likelihoods(to, self._passages)

    @property
    def cost(self) -> Comparison | None:
        """How far the other settings are from the plan's; None if they were not both asked."""
        if self._reference is None or self._other is None:
            return None
        return compare(self._reference, self._other)


def _sample(to: Endpoint) -> Passages:
    """What the model writes behind some openings, at a temperature of 1.

    Raises EvaluationError if the server does not answer as vLLM does.
    """
    body = {
        "model": to.served or to.model,
        "prompt": OPENINGS,
        "max_tokens": TOKENS,
        "temperature": 1,
        "top_p": 1,
        "top_k": 0,
        "seed": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    try:
        answer = httpx.post(f"{to.url}/v1/completions", json=body, timeout=None, trust_env=False)
        answer.raise_for_status()
        choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
        found = [(one["prompt_token_ids"], one["token_ids"]) for one in choices]
        ids = tuple(np.array(before + after, dtype=np.int32) for before, after in found)
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())
        raise EvaluationError(f"{to.url} samples no answers: {said}") from None
    digest = hashlib.sha256(b"".join(one.tobytes() for one in ids)).hexdigest()
    first = tuple(max(1, len(before)) for before, _ in found)
    return Passages(ids, first, "the model's own answers", digest, "one answer each")


def _likelihoods(to: Endpoint, passages: Passages) -> Likelihoods:
    """How probable the passages' tokens are for a server's model. Raises EvaluationError."""
    name = str(to.served or to.model)
    return logprobs_from_server(passages, f"{to.url}/v1", TOP, model=name, shown=False)

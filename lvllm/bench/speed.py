"""Rates and percentiles from the times of requests."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from pydantic import BaseModel

from lvllm.bench.load import Request

__all__ = ["Percentiles", "Result", "decode_rate", "prefill_rate", "result_of"]

LEAST_STEPS = 8
"""So many steps with all users must have been seen before a rate is told from them."""


class Percentiles(BaseModel):
    """Seconds that half, 90% and 99% of the cases do not exceed."""

    p50: float
    p90: float
    p99: float


class Result(BaseModel):
    """What a number of users saw with prompts of one length."""

    prompt: int
    """Tokens of a prompt."""
    answer: int
    """Tokens of an answer."""
    users: int
    requests: int
    first_token: Percentiles
    """From sending a prompt to its first token."""
    between_tokens: Percentiles
    whole: Percentiles
    """From sending a prompt to the last token."""
    output_rate: float
    """Tokens of answers a second, from the first request to the end of the last."""
    prefill_rate: float | None
    """Tokens of a prompt a second; None with several users, whose prompts wait for each other."""
    decode_rate: float | None
    """Tokens a second while all users' answers are under way and no prompt is; None: they never
    were for long enough."""


def result_of(requests: Sequence[Request], answer: int, users: int) -> Result:
    """The result for requests of which `users` were under way at any time."""
    begin, end = min(r.start for r in requests), max(r.end for r in requests)
    between = [b - a for r in requests for a, b in pairwise(r.pieces)]
    return Result(
        prompt=round(float(np.mean([r.prompt for r in requests]))),
        answer=answer,
        users=users,
        requests=len(requests),
        first_token=_percentiles(r.first - r.start for r in requests),
        between_tokens=_percentiles(between or [0.0]),
        whole=_percentiles(r.end - r.start for r in requests),
        output_rate=sum(r.answer for r in requests) / (end - begin),
        prefill_rate=prefill_rate(requests) if users == 1 else None,
        decode_rate=decode_rate(requests, users),
    )


def prefill_rate(requests: Sequence[Request]) -> float:
    """Tokens of a prompt a second, from the median request. Each was alone on the server."""
    return float(np.median([r.prompt / (r.first - r.start) for r in requests]))


def decode_rate(requests: Sequence[Request], users: int) -> float | None:
    """Tokens a second of all users, over the times in which `users` answers are under way.

    Beside them no prompt is computed, so that each step has one token of each user: this is what a
    plan predicts. None if there were fewer than `LEAST_STEPS` such steps.
    """
    edges = sorted({t for r in requests for t in (r.start, r.first, r.end)})
    tokens, seconds = 0.0, 0.0
    for begin, end in pairwise(edges):
        prefilling = any(r.start <= begin < r.first for r in requests)
        decoding = sum(r.first <= begin < r.end for r in requests)
        if prefilling or decoding != users:
            continue
        seconds += end - begin
        # What comes at an edge belongs to the time before it.
        for r in requests:
            pieces = sum(begin < at <= end for at in r.pieces)
            tokens += pieces * r.answer / len(r.pieces)
    return tokens / seconds if tokens >= LEAST_STEPS * users else None


def _percentiles(values: Iterable[float]) -> Percentiles:
    p50, p90, p99 = np.percentile(list(values), (50, 90, 99))
    return Percentiles(p50=p50, p90=p90, p99=p99)

"""Rates from the times of requests whose rates are known."""

import random

import pytest

from lvllm.bench.load import BenchError, Request, requests_of
from lvllm.bench.speed import LEAST_STEPS, decode_rate, prefill_rate, result_of


def together(users: int, steps: int, step: float, prefill: float, begin: float) -> list[Request]:
    """Requests that start together; their prompts are computed one after the other.

    Those that have their first token decode meanwhile, at half the speed.
    """
    last = begin + users * prefill
    made = []
    for user in range(users):
        first = begin + (user + 1) * prefill
        early = [first]
        while early[-1] + 2 * step < last:
            early.append(early[-1] + 2 * step)
        late = [last + step * (k + 1) for k in range(steps)]
        made.append(Request(100, len(early) + steps, begin, (*early, *late)))
    return made


def test_only_times_without_prompts_count() -> None:
    draw = random.Random(random.getrandbits(32))
    step, prefill = draw.uniform(0.01, 0.2), draw.uniform(0.1, 2)
    for users in (1, 2, 7):
        requests = together(users, 20, step, prefill, 3.0) + together(users, 15, step, prefill, 99)
        rate = decode_rate(requests, users)
        assert rate == pytest.approx(users / step, rel=1e-6)
        with_prompts = result_of(requests, 20, users).output_rate
        assert rate is not None
        assert with_prompts < rate


def test_too_few_steps_have_no_rate() -> None:
    assert decode_rate(together(3, LEAST_STEPS - 1, 0.1, 0.5, 0), 3) is None
    assert decode_rate(together(3, LEAST_STEPS, 0.1, 0.5, 0), 3) is not None
    # With another number of users, the answers were never under way together.
    assert decode_rate(together(3, 50, 0.1, 0.5, 0), 4) is None


def test_a_piece_may_have_several_tokens() -> None:
    pieces = tuple(1 + 0.1 * k for k in range(21))
    one = Request(10, 63, 0.5, pieces)
    assert decode_rate([one], 1) == pytest.approx(30)


def test_a_prompts_rate_is_the_median() -> None:
    requests = [Request(300, 2, 0, (seconds, 9)) for seconds in (3.0, 1.0, 2.0)]
    assert prefill_rate(requests) == pytest.approx(150)
    result = result_of(requests, 2, 1)
    assert result.prefill_rate == pytest.approx(150)
    assert (result.first_token.p50, result.whole.p50) == (2, 9)
    assert result.between_tokens.p99 == pytest.approx(7.98)  # of 6, 8 and 7
    assert result_of(requests, 2, 3).prefill_rate is None


def test_vllms_result() -> None:
    found = {
        "input_lens": [7, 9],
        "output_lens": [3, 1],
        "start_times": [10.0, 11.0],
        "ttfts": [1.0, 2.0],
        "itls": [[0.5, 0.25], []],
        "errors": ["", ""],
    }
    assert requests_of(found) == [
        Request(7, 3, 10.0, (11.0, 11.5, 11.75)),
        Request(9, 1, 11.0, (13.0,)),
    ]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ('{"error": {"message": "too long", "code": 400}}', "too long"),
        ("Traceback\n  File x\nConnectionError: refused\n", "ConnectionError: refused"),
        ("{", "{"),
    ],
)
def test_a_failed_request_is_named(error: str, said: str) -> None:
    with pytest.raises(BenchError, match=rf"^1 of 2 requests failed: {said}$"):
        requests_of({"errors": ["", error]})

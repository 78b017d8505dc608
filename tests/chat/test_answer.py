"""The times and the rate of an answer, for chunks that come at times made up here."""

import random
from collections.abc import Iterable

import pytest

from lvllm.chat.answer import Answer
from lvllm.chat.client import Chunk

QUICK = 0.0001
"""Seconds to take a chunk that is there already."""


def arrived(gaps: Iterable[tuple[float, float]], tokens: int | None) -> Answer:
    """An answer of one delta for each pair: seconds of waiting, and of the client's own work."""
    answer = Answer()
    at = answer._asked + 0.2  # The clock of now may be later by any time.
    for waited, worked in gaps:
        at += waited
        list(answer.feed(Chunk("x", at=at, waited=waited)))
        at += worked
    list(answer.feed(Chunk(tokens=tokens, finish_reason="stop", at=at)))
    list(answer.finish())
    return answer


def test_a_normal_server_has_the_rate_of_the_tokens_after_the_first() -> None:
    gap = random.uniform(0.004, 0.5)
    count = random.randrange(40, 200)
    answer = arrived([(gap, 0.0)] * count, count)
    assert answer.tokens_per_second == pytest.approx(1 / gap)
    assert answer.first_token_ms == pytest.approx(200 + 1e3 * gap, abs=5)
    assert f"{1 / gap:.1f} tokens/s" in answer.numbers()


def test_several_tokens_in_a_delta_count() -> None:
    answer = arrived([(0.1, 0.0)] * 21, 63)
    assert answer.tokens_per_second == pytest.approx(30)


def test_a_burst_has_no_rate() -> None:
    burst = [(0.3, 0.0)] + [(random.uniform(0, QUICK), QUICK)] * random.randrange(1, 5000)
    answer = arrived(burst, len(burst))
    assert answer.tokens_per_second is None
    tokens, first, last = answer.numbers()
    assert tokens == f"{len(burst)} tokens"
    assert first.startswith("the first after 5")
    assert last.startswith("all after ")
    assert answer.last_token_ms == pytest.approx(500 + 0.2 * len(burst), rel=0.5)


def test_a_burst_that_a_busy_machine_interrupts_has_no_rate() -> None:
    paused = [(0.3, 0.0), (QUICK, 0.0), (0.02, 0.0), (QUICK, 0.0), (QUICK, 0.0)]
    assert arrived(paused, 5).tokens_per_second is None


def test_a_server_that_is_faster_than_the_client_has_no_rate() -> None:
    drawn = [(0.3, 0.0)] + [(QUICK, 0.01), (0.002, 0.01)] * 50
    assert arrived(drawn, 101).tokens_per_second is None


def test_tokens_that_were_held_back_at_first_do_not_count() -> None:
    held = [(0.6, QUICK)] + [(QUICK, 0.0)] * 19 + [(0.05, 0.0)] * 20
    assert arrived(held, 40).tokens_per_second == pytest.approx(20, rel=0.01)


def test_a_proxy_that_collects_tokens_does_not_change_the_rate() -> None:
    size, seconds = random.randrange(2, 30), random.uniform(0.3, 2)
    collected = ([(seconds, 0.0)] + [(QUICK, 0.0)] * (size - 1)) * 6
    rate = arrived(collected, 6 * size).tokens_per_second
    assert rate == pytest.approx(size / seconds, rel=0.02)


def test_one_token_has_a_time_and_no_rate() -> None:
    answer = arrived([(0.3, 0.0)], 1)
    assert answer.tokens_per_second is None
    tokens, first = answer.numbers()
    assert tokens == "1 token"
    assert first.startswith("the first after 5")


def test_without_a_count_there_are_no_rate_and_no_tokens() -> None:
    answer = arrived([(0.1, 0.0)] * 10, None)
    (only,) = answer.numbers()
    assert only.startswith("the first after ")


def test_an_answer_without_tokens() -> None:
    assert arrived([], 0).numbers() == ["0 tokens"]

"""Tests the spans of a ring: none overlaps another that is taken."""

import random
from collections import deque

from lvllm.gpu.spans import Spans


def test_spans_do_not_overlap_and_follow_the_readers_before_them() -> None:
    for _ in range(200):
        size = random.randint(10, 100)
        spans, taken = Spans(size), deque[tuple[int, int]]()
        # Who has read each byte last, and for each reader which one came before.
        last: list[int] = [-1] * size
        reads, waited = 0, -1
        for _ in range(100):
            wanted = random.randint(1, size // 2)
            got = spans.take(wanted) if random.random() < 0.6 else None
            if got is not None:
                begin, before = got
                assert 0 <= begin <= size - wanted
                assert all(begin + wanted <= b or e <= begin for b, e in taken)
                # Readers end in order, so the last one of these bytes is enough, and a copy before
                # this one may have waited for it.
                waited = max(waited, -1 if before is None else int(before.what))
                assert waited >= max(last[begin : begin + wanted])
                taken.append((begin, begin + wanted))
            elif taken:
                begin, end = taken.popleft()
                if random.random() < 0.8:
                    spans.give_back(object(), str(reads))
                    last[begin:end] = [reads] * (end - begin)
                    reads += 1
                else:
                    spans.give_back(None)


def test_a_span_that_fits_is_always_found_in_the_end() -> None:
    spans = Spans(100)
    assert spans.take(60) == (0, None)
    assert spans.take(60) is None
    spans.give_back(None)
    assert spans.take(60) == (0, None)
    assert spans.take(40) == (60, None)
    assert spans.take(1) is None
    spans.give_back(None)
    assert spans.take(61) is None
    assert spans.take(60) == (0, None)
    assert spans.take(1) is None

"""Regular expressions that are wrong, or whose search would not end."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvllm.patterns import PatternError, begins, check, occurs

NAME = "model.layers.10.mlp.experts.10.gate_proj"
SLOW = r"(\w|\.|[a-z])*[A-Z]$"


@given(st.lists(st.sampled_from([r"\.", "1", "[0-9]", "l", "(e|x)", "a?", "^", "$"]), max_size=5))
def test_python_finds_the_same(parts: list[str]) -> None:
    pattern = "".join(parts)
    try:
        want = re.search(pattern, NAME) is not None, re.match(pattern, NAME) is not None
    except re.error:
        with pytest.raises(PatternError):
            check(pattern)
    else:
        assert (occurs(pattern, NAME), begins(pattern, NAME)) == want


@pytest.mark.parametrize("function", [occurs, begins])
def test_a_search_ends_soon(function: object) -> None:
    begin = time.process_time()
    with pytest.raises(PatternError, match=r"takes too long to be looked for in 'model\.layers"):
        function(SLOW, NAME)  # type: ignore[operator]
    # Without a limit, it would take years.
    assert time.process_time() - begin < 60


@pytest.mark.parametrize("pattern", ["(", "a{9999999999}{2}x**", "[", "(?<a", "\n(" + "x" * 5000])
def test_wrong_ones_are_refused_in_one_short_line(pattern: str) -> None:
    with pytest.raises(PatternError, match="is no regular expression: ") as caught:
        check(pattern)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400

"""Rules from patterns to values."""

import re
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lvllm.rules import Rules, first_fault


class Colour(StrEnum):
    RED = "RED"
    BLUE = "BLUE"


Colours = Rules[Colour]

NAMES = st.lists(
    st.from_regex(r"layers\.[0-3]\.(mlp\.experts|self_attn\.[qk]_proj)", fullmatch=True),
    min_size=1,
    unique=True,
)
PATTERNS = st.sampled_from(
    ["", ".*", "experts", r"layers\.0\.", r"layers\.[12]\.", "q_proj", "[qk]_proj$", "^layers", "z"]
)
WRITTEN = st.lists(
    st.tuples(PATTERNS, st.sampled_from(["RED", "BLUE"])), min_size=1, max_size=6
).map(lambda pairs: [{pattern: value} for pattern, value in pairs])


def matches(rule: dict[str, str], name: str) -> bool:
    return re.search(next(iter(rule)), name) is not None


@given(WRITTEN, NAMES)
def test_the_first_match_wins(written: list[dict[str, str]], names: list[str]) -> None:
    rules = Colours.model_validate(written)
    for name in names:
        matching = [rule for rule in written if matches(rule, name)]
        assert rules.of(name) == (next(iter(matching[0].values())) if matching else None)
    assert rules.model_dump(mode="json") == written
    assert Colours.model_validate_json(rules.model_dump_json()) == rules


@given(WRITTEN, NAMES)
def test_rules_without_effect_are_named(written: list[dict[str, str]], names: list[str]) -> None:
    """Without the rule that is named, every name has the value that it had; and with none named,
    each rule decides about a name.
    """
    rules = Colours.model_validate(written)
    said = rules.without_effect(names)
    values = [rules.of(name) for name in names]
    for number, rule in enumerate(written):
        earlier = written[:number]
        matched = [name for name in names if matches(rule, name)]
        decides = any(not any(matches(one, name) for one in earlier) for name in matched)
        if decides:
            continue
        why = "comes too late: rules before it match all that it matches"
        assert said == f"'{next(iter(rule))}' {why if matched else 'matches nothing'}"
        rest = [*earlier, *written[number + 1 :]]
        without = Colours.model_validate(rest) if rest else None
        assert values == [without and without.of(name) for name in names]
        return
    assert said is None


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([{"a": "RED"}, {"b": "GREEN"}], "rule 2: 'GREEN': Input should be 'RED' or 'BLUE'"),
        ([{"(": "RED"}], "rule 1: '(' is no regular expression: missing )"),
        ([{"a": "RED", "b": "BLUE"}], "rule 1: {'a': 'RED', 'b': 'BLUE'} is not one pattern with"),
        ([{"a": "RED"}, "b"], "rule 2: 'b' is not one pattern with its value"),
        ([{1: "RED"}], "rule 1: 1 is no text: write patterns in quotes"),
        ({"a": "RED"}, "{'a': 'RED'} is no list of rules such as - '.*': VALUE"),
        ([], "[] is no list of rules"),
        (None, "None is no list of rules"),
    ],
)
def test_faults(written: Any, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Colours.model_validate(written)
    said = first_fault(caught.value)
    assert said.startswith(message)
    assert "\n" not in said


def test_a_pattern_that_would_not_end_is_named() -> None:
    rules = Colours.model_validate([{"mlp": "RED"}, {r"(\w|\.|[a-z])*[A-Z]$": "BLUE"}])
    said = rules.without_effect(["model.layers.0.mlp.experts", "model.layers.10.self_attn.q_proj"])
    assert said is not None
    assert said.startswith("'(")
    assert "takes too long to be looked for in 'model.layers.10.self_attn.q_proj'" in said

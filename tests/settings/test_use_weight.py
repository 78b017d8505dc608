"""LVLLM_MOE_USE_WEIGHT as one format and as rules for layers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvllm.settings.use_weight import LayerFormats, UseWeight, UseWeights, WrongRules

NAMES = (
    *(f"model.layers.{number}.mlp.experts" for number in range(12)),
    *(f"mtp.layers.{number}.mlp.experts" for number in range(2)),
)
PATTERNS = st.sampled_from([r"layers\.[0-3]\.", r"layers\.1", "mtp", "^model", ".*", "nothing"])
RULES = st.lists(st.tuples(PATTERNS, st.sampled_from(UseWeight)), min_size=1, max_size=5)


@given(RULES)
def test_each_layer_has_the_format_of_the_first_rule(pairs: list[tuple[str, UseWeight]]) -> None:
    rules = UseWeights.parse(json.dumps([{pattern: use} for pattern, use in pairs]))
    formats = LayerFormats.by_rules(rules, NAMES)
    assert LayerFormats.model_validate_json(formats.model_dump_json()) == formats
    for name in NAMES:
        expected = rules.of(name) or UseWeight.KEEP
        assert formats.of(name) == expected
        # Checkpoints of models with vision have other names for the same layers.
        assert formats.of(name.replace("model.", "model.language_model.")) == expected
    assert formats.of("model.layers.12.mlp.experts") == UseWeight.KEEP


@pytest.mark.parametrize("use", UseWeight)
def test_one_format_for_all_layers(use: UseWeight) -> None:
    for text in (use, json.dumps([{".*": use}])):
        parsed = UseWeights.parse(text)
        assert (parsed.everywhere, str(parsed)) == (use, use)
    assert UseWeights.parse('[{".*": "INT4"}, {"a": "KEEP"}]').everywhere is None


def test_text_that_is_no_yaml() -> None:
    with pytest.raises(WrongRules, match=r"not YAML: .* unknown escape character '\.'"):
        UseWeights.parse(r'[{"layers\.": "INT4"}]')
    with pytest.raises(ValueError, match="INT2"):
        UseWeights.parse("INT2")

"""Sections `quantization_config` with values that no format has."""

from typing import Any

import pytest

from lvllm import formats
from lvllm.checkpoint.headers import CheckpointError

GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (7, "quantization_config is 7: a mapping is wanted"),
        ({"quant_method": 7}, "'quantization_config.quant_method' is 7: "),
        ({"quant_method": "awq", "bits": "x"}, "'quantization_config.bits' is 'x': "),
        ({"quant_method": "gptq", "group_size": [1]}, "'quantization_config.group_size' is [1]: "),
        (
            {"config_groups": {"a": GROUP | {"weights": 3}}},
            "'quantization_config.config_groups.a.weights' is 3: ",
        ),
        (
            {"config_groups": {"a": GROUP | {"targets": None}}},
            "'quantization_config.config_groups.a.targets' is null: ",
        ),
        ({"extra_config": {"lm_head": 16}}, "'quantization_config.extra_config."),
        ({"ignore": ["re:("]}, "'quantization_config.ignore."),
        ({"modules_to_not_convert": [None]}, "'quantization_config.modules_to_not_convert."),
    ],
)
def test_wrong_types_are_named(section: Any, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        formats.describe(section)
    assert str(caught.value).startswith(f"config.json: {said}")
    assert "\n" not in str(caught.value)


def test_a_pattern_that_would_not_end_is_named() -> None:
    slow = r"re:(\w|\.|[a-z])*[A-Z]$"
    section = {"quant_method": "compressed-tensors", "ignore": [slow]}
    with pytest.raises(CheckpointError, match=r"quantization_config: .* takes too long"):
        formats.only_4_bit(section, [0])

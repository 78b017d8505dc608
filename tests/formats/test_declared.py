"""lvllm.formats.declared: what config.json says of the experts."""

from typing import Any

import pytest

from lvllm.engine.weight_formats import GROUP_SIZES
from lvllm.formats.declared import only_4_bit
from tests.models.quantize import MIXED, SCHEMES


def config(name: str) -> dict[str, Any]:
    return {**SCHEMES, **MIXED}[name].config


@pytest.mark.parametrize(
    ("name", "more", "only"),
    [
        ("awq", {"modules_to_not_convert": ["gate", "lm_head", "model.layers.0"]}, False),
        ("awq", {"modules_to_not_convert": ["gate", "lm_head", "model.layers.1"]}, True),
        ("gptq_int4", {}, True),
        ("gptq_int4_act_order", {}, False),
        ("gptq_int8", {}, False),
        ("gptq_int4", {"dynamic": {r"-:.*layers\.2\.mlp.*": {}}}, False),
        ("gptq_int4", {"dynamic": {r"+:.*layers\.2\.mlp\.experts.*": {"bits": 8}}}, False),
        ("auto_round", {}, True),
        ("compressed_int4_channels", {}, True),
        ("compressed_int4_groups_of_16", {}, False),
        ("compressed_int4_act_order", {}, False),
        ("compressed_int8", {}, False),
        ("compressed_mxfp4", {"ignore": [r"re:.*mlp.gate$", r"re:.*attn.*", "lm_head"]}, True),
        ("compressed_nvfp4", {"ignore": ["model.layers.0.mlp.experts.0.down_proj"]}, False),
        ("compressed_nvfp4", {"ignore": [r"re:.*layers\.0\..*"]}, False),
        ("compressed_int4_and_fp8", {}, False),
        ("modelopt_nvfp4", {"exclude_modules": ["lm_head", "*.mlp.gate"]}, True),
        ("modelopt_nvfp4", {"exclude_modules": ["model.layers.0.*"]}, False),
        ("modelopt_fp8", {}, False),
        ("fp8_blocks", {}, False),
    ],
)
def test_only_4_bit(name: str, more: dict[str, Any], only: bool) -> None:
    assert only_4_bit(config(name) | more, [0, 2], GROUP_SIZES) == only


def test_gpt_oss() -> None:
    assert only_4_bit({"quant_method": "mxfp4"}, [0], GROUP_SIZES)

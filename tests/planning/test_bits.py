"""Bits of a weight, from `quantization_config`."""

from typing import Any

import pytest

from lvllm.planning.bits import Bits, of_section

GROUPS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 32,
                "symmetric": True,
            },
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*"],
}


@pytest.mark.parametrize(
    ("section", "bits"),
    [
        (None, Bits("bf16", 16, 16)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Bits("fp8", 8, 8, block=128)),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, Bits("int4", 4.125, 4.125)),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True}, Bits("int8", 8, 8)),
        (
            {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
            Bits("mxfp4", 4.25, 16, block=32),
        ),
        (GROUPS, Bits("int4", 4.5, 16)),
    ],
)
def test_sections(section: dict[str, Any] | None, bits: Bits) -> None:
    assert of_section(section) == bits

"""Batches and layers that the engine refuses in one line."""

from typing import Any

import pytest
import torch

from lvllm.engine import ExpertLayer
from tests.engine.random_case import Case, arguments_of

pytestmark = pytest.mark.usefixtures("default_settings")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.ids.fill_(7), r"topk_ids\[0, 0\] is 7, must be -1 \(skip\) to 3"),
        (lambda c: c.ids.fill_(-2), "is -2"),
        (lambda c: setattr(c, "ids", c.ids.long() + 2**40), "topk_ids"),
        (lambda c: setattr(c, "ids", c.ids.float()), "int32 or int64"),
        (lambda c: setattr(c, "ids", c.ids[:2]), "topk_ids"),
        (lambda c: setattr(c, "weights", c.weights.double()), "topk_weights.*float32"),
        (lambda c: setattr(c, "weights", c.weights[:, :1]), "topk_weights"),
        (lambda c: setattr(c, "x", c.x[:, :63]), "63.*hidden size is 64"),
        (lambda c: setattr(c, "x", c.x.float()), "x must be bfloat16 or float16"),
        (lambda c: setattr(c, "x", c.x[:, ::2]), "contiguous rows"),
    ],
)
def test_wrong_batches(change: object, message: str) -> None:
    case = Case(3, 64, 32, 4, 2)
    change(case)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        case.run()


def u8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("int3", {}, "format is 'int3', must be one of bf16, fp16, fp8, int8, int4, mxfp4, nvfp4"),
        ("bf16", {"activation": "relu"}, "activation is 'relu', must be one of silu, .*, relu2"),
        ("bf16", {"w13": torch.zeros(2, 64, 64)}, "w13 is torch.float32, wanted torch.bfloat16"),
        ("fp8", {"w2": u8(2, 64, 32)}, "w2 is torch.uint8, wanted torch.float8_e4m3fn"),
        ("int4", {"w2": u8(2, 64, 32)}, r"w2 has shape \(2, 64, 32\), .* wants \(2, 64, 16\)"),
        ("bf16", {"w13": torch.zeros(2, 63, 64).bfloat16()}, "w13 has 63 rows an expert"),
        ("int4", {"w13": u8(2, 62, 32)}, "w13 has 62 rows an expert, wanted a multiple of 4"),
        ("bf16", {"w13": torch.zeros(64, 64).bfloat16()}, r"w13 has shape \(64, 64\)"),
        ("bf16", {"w13": torch.zeros(2, 64, 0).bfloat16()}, r"w13 has shape \(2, 64, 0\)"),
        ("bf16", {"w13": torch.zeros(2, 64, 64).bfloat16().mT}, "w13 has strides"),
        ("bf16", {"w13": torch.zeros(2, 64, 64).bfloat16().to("meta")}, "w13 is on meta"),
        ("bf16", {"w13": torch.ones(2, 64, 64).bfloat16().to_sparse()}, "w13 is torch.sparse_coo"),
        ("bf16", {"w2_scale": torch.zeros(2)}, "w2_scale was given, but format bf16 has none"),
        ("fp8", {"w13_scale": None}, "w13_scale is missing, format fp8 wants it"),
        (
            "fp8",
            {"w13_scale": torch.ones(2, 64, 64)},
            r"w13_scale has shape \(2, 64, 64\), wanted \(2, 1, 1\) or \(2, 64\) or \(2,\)",
        ),
        ("fp8", {"w2_scale": torch.ones(2, 64).double()}, "w2_scale is torch.float64, wanted .*32"),
        ("int8", {"w2_scale": torch.ones(2)}, r"w2_scale has shape \(2,\), wanted \(2, 64\)"),
        ("int8", {"w2_scale": torch.ones(64, 2).T}, "w2_scale has strides"),
        ("int8", {"w2_scale": torch.ones(2, 64).half()}, "w2_scale is torch.float16, wanted .*32"),
        ("int8", {"group_size": 32}, r"w13_scale has shape \(2, 64\), wanted \(2, 64, 2\)"),
        ("int8", {"group_size": 16}, "group_size is 16, must be one of 32, 64, 128, -1"),
        ("int4", {"w13_scale": torch.ones(2, 64)}, r"wanted \(2, 64, 2\)"),
        ("int4", {"group_size": -1}, r"w13_scale has .*, wanted \(2, 64, 1\) or \(2, 64\)"),
        ("int4", {"group_size": 16}, "group_size is 16, must be one of 32, 64, 128, -1"),
        ("mxfp4", {"group_size": 16}, "group_size is 16, but format mxfp4 has groups of 32"),
        ("fp8", {"group_size": 128}, "group_size is 128, but format fp8 has no groups"),
        ("int4", {"w13_zero": u8(2, 64, 2)}, "w13_zero was given, but w2_zero was not"),
        ("int4", {"w2_zero": u8(2, 64, 2)}, r"w2_zero has shape .*, wanted \(2, 64, 1\)"),
        ("int8", {"w2_zero": u8(2, 64)}, "w2_zero was given, but format int8 has no zero points"),
        ("mxfp4", {"w2_scale": torch.ones(2, 64, 1)}, "w2_scale is torch.float32, wanted .*uint8"),
        ("nvfp4", {"w2_scale": u8(2, 64, 2)}, "w2_scale is torch.uint8, wanted .*e4m3fn"),
        ("nvfp4", {"w2_global_scale": None}, "w2_global_scale is missing"),
        ("nvfp4", {"w13_global_scale": torch.ones(2)}, r"w13_global_scale has .* \(2, 2\)"),
        ("mxfp4", {"w13_global_scale": torch.ones(2, 2)}, "w13_global_scale was given"),
        ("bf16", {"w13_bias": torch.ones(2, 32)}, r"w13_bias has shape .*, wanted \(2, 64\)"),
        ("bf16", {"w2_bias": torch.ones(2, 64).int()}, "w2_bias is torch.int32, wanted"),
        ("bf16", {"interleaved": True, "activation": "relu2"}, "interleaved is True, but"),
        ("bf16", {"swiglu_limit": 0.0}, "swiglu_limit is 0.0, must be greater than 0"),
        ("bf16", {"swiglu_alpha": float("nan")}, "swiglu_alpha is nan, must be finite"),
        ("bf16", {"swiglu_beta": float("inf")}, "swiglu_beta is inf, must be finite"),
        ("bf16", {"activation_bits": 8}, "activation_bits of format bf16 is 8, must be one of 16"),
        ("int8", {"activation_bits": 4}, "activation_bits of .* is 4, must be one of 16, 8"),
    ],
)
def test_wrong_layers(format: str, changes: dict[str, Any], message: str) -> None:
    arguments = arguments_of("bf16" if format == "int3" else format, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        ExpertLayer(**(arguments | {"format": format}))
    assert "\n" not in str(caught.value)

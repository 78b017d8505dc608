"""Checks of the checkpoint formats that need no model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lvllm.formats import base


def layer(**tensors: torch.Tensor) -> Any:
    named = {name: torch.nn.Parameter(data, requires_grad=False) for name, data in tensors.items()}
    return SimpleNamespace(layer_name="model.layers.3.mlp.experts", **named)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_that_are_no_numbers_are_named(dtype: torch.dtype, bad: float) -> None:
    good = torch.rand(4, 6, 3).to(dtype)
    spoilt = good.clone()
    spoilt[2, 5, 1] = bad
    kept = base.check_scales(layer(w13_scale=good, w2_scale=good), "scale")
    assert torch.equal(kept[0], good)
    with pytest.raises(ValueError, match=r"^model\.layers\.3\.mlp\.experts: w2_scale of expert 2 "):
        base.check_scales(layer(w13_scale=good, w2_scale=spoilt), "scale")


def test_missing_scales_of_each_kind_are_noticed() -> None:
    """What create_weights fills them with: NaN, in every dtype that scales have."""
    for missing in (
        torch.full((2,), torch.nan),
        torch.full((2, 3), 0xFF, dtype=torch.uint8),  # e8m0
        torch.full((2, 3), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn),
    ):
        with pytest.raises(ValueError, match=r"w13_scale of expert 0 .* missing"):
            base.check_scales(layer(w13_scale=missing, w2_scale=missing), "scale")

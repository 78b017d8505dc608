"""What of gpt-oss needs no model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts

from lvllm import formats
from lvllm.formats.base import Shape
from lvllm.formats.gpt_oss import GptOssMxfp4, GptOssPlain

LAYER: Any = object.__new__(GptOssRoutedExperts)


def test_another_repacking_is_refused_by_name() -> None:
    quark = SimpleNamespace(get_name=lambda: "quark")
    with pytest.raises(ValueError, match=r"^model\.layers\.1: gpt-oss quantised as 'quark' is not"):
        formats.find(quark, LAYER, "model.layers.1")


def no_loader(*_: Any, **__: Any) -> None:
    pass


def test_shares_that_cut_a_group_of_scales_are_refused() -> None:
    share = Shape(experts=2, hidden=64, intermediate=48, parts=2)
    with pytest.raises(ValueError, match="w2 has 48 columns in this process, wanted a multiple of"):
        GptOssMxfp4().create_weights(
            torch.nn.Module(), share, torch.bfloat16, {"weight_loader": no_loader}
        )


@pytest.mark.parametrize("missing", ["w13_weight", "w2_weight"])
@pytest.mark.parametrize("packed", [False, True])
def test_weights_that_never_came_are_named(missing: str, packed: bool) -> None:
    format = GptOssMxfp4() if packed else GptOssPlain()
    layer: Any = torch.nn.Module()
    layer.layer_name = "model.layers.1.mlp.experts"
    shape = Shape(experts=2, hidden=64, intermediate=32, parts=2)
    format.create_weights(layer, shape, torch.bfloat16, {"weight_loader": no_loader})
    for name, parameter in layer.named_parameters():
        if name != missing:
            parameter.data.fill_(1)
            if packed:
                parameter.weight_loader(parameter, parameter.data, weight_name=f"layers.1.{name}")
    stored = format.STORED[missing]
    with pytest.raises(ValueError, match=rf"^model\.layers\.1\.mlp\.experts\.{stored} is not in"):
        format.tensors(layer)

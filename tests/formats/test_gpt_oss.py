"""What of gpt-oss needs no model."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts

from lvllm import formats
from lvllm.checkpoint.headers import CheckpointError, TensorInfo
from lvllm.formats.base import Shape
from lvllm.formats.gpt_oss import GptOssMxfp4, GptOssPlain, check_shapes

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


EXPERTS, HIDDEN, INTERMEDIATE = 6, 160, 96
CONFIG = SimpleNamespace(
    num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE
)
SHAPES = {
    "gate_up_proj": (HIDDEN, 2 * INTERMEDIATE),
    "gate_up_proj_bias": (2 * INTERMEDIATE,),
    "gate_up_proj_blocks": (2 * INTERMEDIATE, HIDDEN // 32, 16),
    "gate_up_proj_scales": (2 * INTERMEDIATE, HIDDEN // 32),
    "down_proj": (INTERMEDIATE, HIDDEN),
    "down_proj_bias": (HIDDEN,),
    "down_proj_blocks": (HIDDEN, INTERMEDIATE // 32, 16),
    "down_proj_scales": (HIDDEN, INTERMEDIATE // 32),
}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_tensors_of_experts_have_the_models_shape(name: str, together: bool) -> None:
    prefix = "model.layers.1.mlp.experts." + ("" if together else "3.")
    shape = (EXPERTS, *SHAPES[name]) if together else SHAPES[name]
    sound = TensorInfo(f"{prefix}{name}", Path("a.safetensors"), torch.uint8, shape, 0, 0)
    other = replace(sound, name="model.layers.1.mlp.router.weight", shape=(1,))
    check_shapes(CONFIG, [sound, other])
    for dim, size in enumerate(shape):
        for wrong in (size + 1, 2 * size, size - 1):
            damaged = (*shape[:dim], wrong, *shape[dim + 1 :])
            with pytest.raises(CheckpointError) as caught:
                check_shapes(CONFIG, [replace(sound, shape=damaged)])
            assert str(caught.value) == (
                f"a.safetensors: tensor '{sound.name}': does not fit the model: has"
                f" {list(damaged)} where the model takes {list(shape)}"
            )
    for damaged in ((), (1, *shape), shape[1:]):
        with pytest.raises(CheckpointError, match="does not fit the model"):
            check_shapes(CONFIG, [replace(sound, shape=damaged)])

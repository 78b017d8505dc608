"""Tensors of experts in another shape than the model's, in every format.

vLLM's loader takes the first rows of a tensor that is too long, and repeats a single number.
"""

import itertools
import random
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEFactory

from lvllm.errors import LayerError, TensorError
from tests.formats.test_descriptors import vllms_view
from tests.models.quantize import SCHEMES, Tensors

EXPERTS, HIDDEN, INTERMEDIATE = 2, 256, 512
MODELS = itertools.count()
"""vLLM wants another name for each layer."""
PROJECTIONS = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}


def tensors(scheme: str) -> Tensors:
    """A checkpoint's tensors of one layer's experts, by their names below the layer's name."""
    stored: Tensors = {}
    for expert in range(EXPERTS):
        for name, size in PROJECTIONS.items():
            weight = torch.randn(size)
            if scheme == "biased":
                parts = {"weight": weight.bfloat16(), "bias": torch.randn(size[0]).bfloat16()}
            else:
                parts, _ = SCHEMES[scheme].quantize(weight)
            stored |= {f"{expert}.{name}.{suffix}": data for suffix, data in parts.items()}
    return stored


def layer_of(scheme: str, ranks: int) -> Any:
    """The experts that the first of `ranks` of tensor parallelism has."""
    section = {}
    if scheme in SCHEMES:
        section["quant_config"] = vllms_view(SCHEMES[scheme].config)
    return FusedMoEFactory(
        num_experts=EXPERTS,
        top_k=1,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        params_dtype=torch.bfloat16,
        tp_size=ranks,
        has_bias=scheme == "biased",
        prefix=f"model{next(MODELS)}.layers.0.mlp.experts",
        **section,
    ).routed_experts


def misshapen(data: torch.Tensor) -> list[torch.Tensor]:
    """The tensor in wrong shapes: too long and too short in each dimension, and others."""
    found = [data.unsqueeze(0).repeat(3, *[1] * data.dim())]
    for dim in range(data.dim()):
        length = data.shape[dim]
        found += [torch.cat([data, data.narrow(dim, 0, 1)], dim), torch.cat([data, data], dim)]
        if length > 1:
            found += [data.narrow(dim, 0, length - 1), data.narrow(dim, 0, 1)]
            found.append(data.narrow(dim, 0, length // 2))
    if data.numel() > 1:
        found += [data.flatten()[0], data.flatten()[:1]]
    if data.dim() == 2 and data.shape[0] != data.shape[1]:
        found.append(data.t())
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scheme", ["biased", *SCHEMES])
def test_another_shape_is_refused(scheme: str, ranks: int, vllm_config: VllmConfig) -> None:
    stored = tensors(scheme)
    with set_current_vllm_config(vllm_config):
        layer = layer_of(scheme, ranks)
        expert = random.randrange(EXPERTS)
        for name, data in stored.items():
            if not name.startswith(f"{expert}."):
                continue
            for wrong in misshapen(data):
                with pytest.raises(TensorError, match=r"^does not fit the model: has \[") as caught:
                    list(layer.load_weights([(name, wrong)]))
                if data.numel() > 1 and wrong.dim() < 3:  # with 3 it may be that of all experts
                    assert str(caught.value).endswith(f"takes {list(data.shape)}"), name
        with pytest.raises(LayerError, match="is not in the checkpoint, nor are"):
            layer.quant_method.arrivals.require_all()
        list(layer.load_weights(stored.items()))
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_experts_in_one_tensor(ranks: int, vllm_config: VllmConfig) -> None:
    stored = {
        "gate_up_proj": torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN).bfloat16(),
        "down_proj": torch.randn(EXPERTS, HIDDEN, INTERMEDIATE).bfloat16(),
    }
    with set_current_vllm_config(vllm_config):
        layer = layer_of("plain", ranks)
        for key, data in stored.items():
            for dim in range(3):
                wrong = torch.cat([data, data.narrow(dim, 0, 1)], dim)
                with pytest.raises(TensorError, match=r"^does not fit the model: "):
                    list(layer.load_weights([(key, wrong)]))
        list(layer.load_weights(stored.items()))
        layer.quant_method.process_weights_after_loading(layer)

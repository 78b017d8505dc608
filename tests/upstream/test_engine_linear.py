"""Linear layers outside the experts, which the engine multiplies in place of vLLM's kernels."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from lvllm.settings.configuration import RESOLVED
from lvllm.upstream import engine_linear

HIDDEN = 96
# One more row than the least that LVLLM_DENSE_WEIGHT=INT8 rounds, and fewer, as a router has.
LARGE, SMALL = engine_linear.LEAST_INT8_ROWS + 1, 128


@pytest.fixture(autouse=True)
def settings(vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The settings that workers get, which a test may change."""
    # Whatever this machine has: without AMX, KEEP is for the engine.
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    resolved: dict[str, Any] = vllm_config.additional_config[RESOLVED]
    before = dict(resolved)
    with set_current_vllm_config(vllm_config):
        yield resolved
    resolved.clear()
    resolved.update(before)


def linear(rows: int, dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> Any:
    """A layer of vLLM with random weights, which vLLM has processed."""
    layer = ReplicatedLinear(
        HIDDEN, rows, bias=bias, params_dtype=dtype, return_bias=False, prefix="layer"
    )
    layer.weight.data.copy_(torch.randn(rows, HIDDEN))
    if bias:
        layer.bias.data.copy_(torch.randn(rows))
    layer.given = layer.weight.detach().float()
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_multiplied_as_it_is(dtype: torch.dtype, bias: bool) -> None:
    layer, x = linear(LARGE, dtype, bias), torch.randn(7, HIDDEN).to(dtype)
    assert layer.weight.numel() == 0, "the weights are in memory once"
    want = x.float() @ layer.given.T + (layer.bias.float() if bias else 0)
    assert error(layer(x), want) < 5e-3  # y, and a sum with a bias, are rounded to bf16


def test_int8_rounds_large_layers(settings: dict[str, Any]) -> None:
    settings["dense_weight"] = "INT8"
    x = torch.randn(7, HIDDEN).bfloat16()
    large, small = linear(LARGE), linear(SMALL)
    assert 4e-3 < error(large(x), x.float() @ large.given.T) < 3e-2, "8 bits, not 16"
    assert error(small(x), x.float() @ small.given.T) < 4e-3, "routers keep 16 bits"


@pytest.mark.parametrize("weight", ["KEEP", "INT8"])
def test_the_head_and_embeddings(settings: dict[str, Any], weight: str) -> None:
    settings["dense_weight"] = weight
    torch.set_default_dtype(torch.bfloat16)
    try:
        head, embeddings = ParallelLMHead(LARGE, HIDDEN), VocabParallelEmbedding(LARGE, HIDDEN)
    finally:
        torch.set_default_dtype(torch.float32)
    x = torch.randn(3, HIDDEN).bfloat16()
    bound = 4e-3 if weight == "KEEP" else 3e-2
    for layer in (head, embeddings):
        layer.weight.data.copy_(torch.randn_like(layer.weight.float()))
        given = layer.weight.detach().clone()
        layer.quant_method.process_weights_after_loading(layer)
        assert torch.equal(layer.weight, given), "other layers may be tied to it"
        # Gemma and others use the embeddings as their head.
        assert error(layer.quant_method.apply(layer, x), x.float() @ given.float().T) < bound


def test_models_without_experts_are_left_to_vllm(settings: dict[str, Any]) -> None:
    settings["dense_weight"] = None
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.ones(4, HIDDEN).bfloat16())
    assert not engine_linear.take(layer, remove_weight=True)
    assert not engine_linear.take(linear(SMALL), remove_weight=True)


def test_layers_that_are_none_of_the_engines_are_left_to_vllm() -> None:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.ones(4, HIDDEN).bfloat16())
    assert not engine_linear.take(layer, remove_weight=True), "no linear layer of vLLM"
    layer = linear(SMALL, torch.float32)
    x = torch.randn(2, HIDDEN)
    assert torch.allclose(layer(x), x @ layer.given.T, atol=1e-4), "float32 stays with vLLM"


def test_bf16_is_left_to_amx(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    layer = ReplicatedLinear(HIDDEN, LARGE, bias=False, params_dtype=torch.bfloat16)
    layer.weight.data.fill_(1)
    assert not engine_linear.take(layer, remove_weight=True)
    settings["dense_weight"] = "INT8"
    assert engine_linear.take(layer, remove_weight=True)

"""The engine against float32."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lvllm import engine
from lvllm.verifying import layer as verifying
from lvllm.verifying.layer import PROMISED, bound, products
from lvllm.verifying.reference import expert_block
from tests.random_layers import FORMATS, Random, random_layer


@pytest.fixture(autouse=True)
def engine_as_it_was() -> Iterator[None]:
    yield
    engine.configure()


@pytest.mark.parametrize("format", FORMATS)
def test_every_instruction_set_is_right(format: str) -> None:
    layer = random_layer(Random(1), format, 6, 128, 96, bias=True).make()
    engine.configure(threads=2)
    found = list(products(layer, [5, 0, 3, 2], engine.available_isas()))
    assert {one.tokens for one in found} == {1, 7, 96}
    assert len(found) == 3 * len(engine.available_isas())
    assert [one for one in found if not one.right] == []
    assert all(one.error > 0 for one in found)
    assert engine.info().threads == 2
    assert engine.info().rates  # The choice of the instruction set is the engine's again.


@pytest.mark.parametrize("matrix", ["w13", "w2"])
def test_wrong_weights_in_the_engine_are_found(
    matrix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference sees the weights, and the engine sees others."""
    layer = random_layer(Random(2), "bf16", 4, 128, 96).make()
    kept = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    layer.tensors[matrix][2] *= 1.25

    def with_kept(*arguments: Any) -> torch.Tensor:
        now = {name: tensor.clone() for name, tensor in layer.tensors.items()}
        for name, tensor in kept.items():
            layer.tensors[name].copy_(tensor)
        want = expert_block(*arguments)
        for name, tensor in now.items():
            layer.tensors[name].copy_(tensor)
        return want

    monkeypatch.setattr(verifying, "expert_block", with_kept)
    assert all(one.right for one in products(layer, [0, 1, 3], [None]))
    assert not all(one.right for one in products(layer, [0, 1, 2, 3], [None]))


def test_nan_is_wrong() -> None:
    layer = random_layer(Random(3), "bf16", 2, 64, 32).make()
    layer.tensors["w13"][1] = torch.nan
    found = list(products(layer, [0, 1], [None]))
    assert not any(one.right for one in found)


@pytest.mark.parametrize(
    "layer",
    [
        {"activation": "silu"},
        {"activation": "gelu"},
        {"activation": "gelu_tanh"},
        {"activation": "relu2"},
        {"activation": "swiglustep", "swiglu_limit": 0.5},
        {"activation": "swigluoai", "interleaved": True, "swiglu_limit": 0.5},
        {"activation": "swigluoai", "swiglu_alpha": 1.0, "swiglu_beta": 0.0},
    ],
)
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("format", ["bf16", "mxfp4"])
def test_the_reference(layer: dict[str, Any], on_input: bool, format: str) -> None:
    """It is written apart from that of the tests, and both agree."""
    random = Random(4)
    other = random_layer(
        random, format, 5, 64, 96, bias=True, apply_router_weight_on_input=on_input, **layer
    )
    x = random.normal(9, 64)
    ids = random.integers(0, 5, 9, 2).int()
    ids[3] = -1
    weights = random.uniform(0.1, 1.1, 9, 2)
    want = other.reference(x, ids, weights)
    got = expert_block(other.make(), x, ids, weights)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_bounds_are_those_that_the_engine_promises() -> None:
    said = " ".join((engine.ExpertLayer.__doc__ or "").split())
    assert "below 3.5e-3" in said
    assert "below 1.5e-2" in said
    assert PROMISED == {16: 3.5e-3, 8: 1.5e-2}
    assert bound(16, 2000) == 7e-3
    assert bound(8, 1999) == 6e-2

"""Damage in weights."""

from collections.abc import Callable, Sequence

import pytest
import torch

from lvllm.verifying.weights import Damage, damages
from tests.random_layers import FORMATS, Layer, Random, random_layer

Change = Callable[[torch.Tensor], None]


def layer_of(format: str) -> Layer:
    return random_layer(Random(3), format, 6, 64, 96)


def damages_of(weights: Layer, experts: Sequence[int] = range(6)) -> list[Damage]:
    return list(damages(weights.make(), experts))


@pytest.mark.parametrize("format", FORMATS)
def test_sound_weights(format: str) -> None:
    assert damages_of(layer_of(format)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w[4, 5, 6].fill_(torch.nan), "1 weights are NaN"),
        (lambda w: w[4, :2, 6].fill_(-torch.inf), "2 weights are infinite"),
        (lambda w: w[4].zero_(), "all weights are zero"),
        (lambda w: w[4].mul_(64), "its weights are "),
        (lambda w: w[4].mul_(1 / 64), "its weights are "),
        (lambda w: w[4, 7].mul_(2**12), "row 7 is "),
    ],
)
@pytest.mark.parametrize("matrix", ["w13", "w2"])
def test_damaged_weights(matrix: str, change: Change, said: str) -> None:
    weights = layer_of("bf16")
    change(weights.arguments[matrix])
    (found,) = damages_of(weights)
    assert (found.matrix, found.expert) == (matrix, 4)
    assert found.what.startswith(said)


@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_a_damaged_scale(format: str) -> None:
    weights = layer_of(format)
    weights.arguments["w2_scale"][2] *= 2**6
    (found,) = damages_of(weights)
    assert (found.matrix, found.expert) == ("w2", 2)
    times = float(found.what.removeprefix("its weights are ").split()[0])
    assert 48 < times < 96


def test_some_experts_only() -> None:
    weights = layer_of("bf16")
    weights.arguments["w13"][4].zero_()
    layer = weights.make()
    assert list(damages(layer, [0, 1, 2])) == []
    assert len(list(damages(layer, [4, 5]))) == 1

"""Activations of 8 and of 16 bits: where each is used, and who decides it."""

import pytest
import torch

from lvllm import engine
from tests.engine.random_case import ISAS, WITHOUT_VNNI, Case
from tests.random_layers import Random, random_layer

pytestmark = pytest.mark.usefixtures("default_settings")


@pytest.mark.parametrize("isa", WITHOUT_VNNI)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_without_vnni_activations_keep_16_bits(isa: str, format: str) -> None:
    engine.configure(isa=isa)
    case = Case(20, 130, 94, 3, 2, format=format, activation_bits=8)
    exact = case.weights_of.make(activation_bits=16)
    assert torch.equal(case.run(), exact(case.x, case.ids, case.weights))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_8_bits_differ_where_there_is_vnni(format: str) -> None:
    if set(ISAS) == set(WITHOUT_VNNI):
        pytest.skip("this CPU has no VNNI")
    engine.configure(isa="avx512_vnni")
    case = Case(20, 130, 94, 3, 2, format=format, activation_bits=8)
    exact = case.weights_of.make(activation_bits=16)
    assert not torch.equal(case.run(), exact(case.x, case.ids, case.weights))


@pytest.mark.parametrize(
    ("variable", "bits"),
    [
        (None, {"int8": 8, "int4": 16, "bf16": 16}),
        ("", {"int8": 8, "int4": 16, "bf16": 16}),
        ("16", {"int8": 16, "int4": 16, "bf16": 16}),
        ("8", {"int8": 8, "int4": 8, "bf16": 16, "fp8": 16, "nvfp4": 16}),
    ],
)
def test_activation_bits_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, bits: dict[str, int]
) -> None:
    if variable is not None:
        monkeypatch.setenv("LK_ACTIVATION_BITS", variable)
    layers = {name: random_layer(Random(), name, 1, 4, 4) for name in bits}
    assert {name: layer.make().activation_bits for name, layer in layers.items()} == bits
    assert layers["int8"].make(activation_bits=16).activation_bits == 16, "the argument wins"


def test_wrong_activation_bits_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LK_ACTIVATION_BITS", "4")
    with pytest.raises(ValueError, match="LK_ACTIVATION_BITS='4' is not allowed: 16 or 8"):
        random_layer(Random(), "int4", 1, 4, 4).make()

"""Activations of 8 and of 16 bits: where each is used, and who decides it."""

import pytest
import torch

from lvllm import engine
from tests.engine.random_case import ISAS, Case
from tests.random_layers import Random, random_layer

pytestmark = pytest.mark.usefixtures("default_settings")


VNNI = ("avx2_vnni", "avx512_vnni", "avx512_vbmi", "avx512_bf16", "amx")
DEFAULTS = {"bf16": 16, "fp16": 16, "fp8": 16, "int8": 16, "int4": 8, "mxfp4": 8, "nvfp4": 8}
"""The bits of activations by format, where nobody has chosen them."""


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ["int8", "int4", "mxfp4", "nvfp4"])
def test_8_bits_are_used_where_the_cpu_multiplies_bytes(isa: str, format: str) -> None:
    """Of 4 bits, AVX2 does. Of 8 bits, VNNI alone does, and others keep activations of 16 bits."""
    engine.configure(isa=isa)
    case = Case(20, 128, 96, 3, 2, format=format, activation_bits=8)
    exact = case.weights_of.make(activation_bits=16)
    same = torch.equal(case.run(), exact(case.x, case.ids, case.weights))
    bytes_are_multiplied = isa in VNNI if format == "int8" else isa != "portable"
    assert same != bytes_are_multiplied


@pytest.mark.parametrize(
    ("variable", "bits"),
    [
        (None, DEFAULTS),
        ("", DEFAULTS),
        (" \t", DEFAULTS),
        ("auto", DEFAULTS),
        ("16", dict.fromkeys(DEFAULTS, 16)),
        (" 16 ", dict.fromkeys(DEFAULTS, 16)),
        ("8", DEFAULTS | {"int8": 8}),
    ],
)
def test_activation_bits_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, bits: dict[str, int]
) -> None:
    if variable is not None:
        monkeypatch.setenv("LK_ACTIVATION_BITS", variable)
    layers = {name: random_layer(Random(), name, 1, 4, 4) for name in bits}
    assert {name: layer.make().activation_bits for name, layer in layers.items()} == bits
    for given in (8, 16):
        assert layers["int8"].make(activation_bits=given).activation_bits == given
        assert layers["int4"].make(activation_bits=given).activation_bits == given


@pytest.mark.parametrize("variable", ["4", "08", "8.0", "1 6", "8,16", "Auto", "None", "0"])
def test_wrong_activation_bits_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("LK_ACTIVATION_BITS", variable)
    with pytest.raises(ValueError) as caught:
        random_layer(Random(), "int4", 1, 4, 4).make()
    assert str(caught.value) == f"LK_ACTIVATION_BITS={variable!r} is not allowed: auto, 8 or 16"


@pytest.mark.parametrize("format", DEFAULTS)
def test_the_default_computes_as_its_number_does(format: str) -> None:
    """Without a number, the result has the same bits as with the format's own."""
    case = Case(20, 128, 96, 3, 2, format=format)
    same = case.weights_of.make(activation_bits=DEFAULTS[format])
    assert torch.equal(case.run(), same(case.x, case.ids, case.weights))

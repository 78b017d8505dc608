"""Converting experts while loading: the values of each stored format, and the converted weights."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lvllm.engine import ExpertLayer, quantize
from lvllm.engine.dequantize import computable, values
from lvllm.formats import integers
from lvllm.formats.base import ExpertFormat, Shape, add_parameter
from lvllm.formats.unquantized import Unquantized
from lvllm.moe.converted import Conversion, Converted, choose
from lvllm.settings.use_weight import UseWeight
from tests.random_layers import FORMATS, Random, dequantise, random_layer

EXPERTS, HIDDEN, INTERMEDIATE = 3, 80, 48
NAME = "model.layers.3.mlp.experts"


class Stored(ExpertFormat):
    """A checkpoint format whose parameters are the given `tensors`, loaded as they are."""

    def __init__(self, tensors: dict[str, Any], bits: int = 8) -> None:
        self.held = tensors
        self.bits = bits
        self.computable = computable(tensors)

    def create_weights(
        self, layer: Any, shape: Shape, dtype: torch.dtype, attributes: dict[str, Any]
    ) -> None:
        for name, tensor in self.held.items():
            if isinstance(tensor, torch.Tensor):
                data = shape.allocate(tensor.shape, tensor.dtype, parts=1)
                add_parameter(layer, name, data.copy_(tensor), attributes)
        add_parameter(layer, "w13_input_scale", torch.ones(3), attributes, optional=True)

    def tensors(self, layer: Any) -> dict[str, Any]:
        return {name: getattr(layer, name, given) for name, given in self.held.items()}


def conversion(target: UseWeight, dummy: bool = False) -> Conversion:
    return Conversion(target, "cpu", tuple(os.sched_getaffinity(0)), dummy)


def convert(source: ExpertFormat, target: UseWeight, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The arguments of `ExpertLayer` after converting `source`, and the layer's module."""
    layer = torch.nn.Module()
    converted = Converted(source, conversion(target), NAME)
    converted.create_weights(layer, Shape(EXPERTS, HIDDEN, INTERMEDIATE, 2), dtype, {})
    # While vLLM loads a model, the model's dtype is PyTorch's default dtype.
    torch.set_default_dtype(torch.bfloat16)
    try:
        return converted.tensors(layer), layer
    finally:
        torch.set_default_dtype(torch.float32)


def arguments(format: str, seed: int, **more: Any) -> dict[str, Any]:
    layer = random_layer(Random(seed), format, EXPERTS, HIDDEN, INTERMEDIATE, **more)
    return {name: value for name, value in layer.arguments.items() if name != "activation"}


def values_of_all(tensors: dict[str, Any], name: str) -> torch.Tensor:
    """The values of all experts' w13 or w2: float32 [E, rows, columns]."""
    return torch.stack([values(tensors, name, expert) for expert in range(EXPERTS)])


@pytest.mark.parametrize(
    ("format", "more"),
    [
        *((format, {}) for format in FORMATS),
        ("fp8", {"fp8_scale": "channel"}),
        ("fp8", {"fp8_scale": "tensor"}),
        ("int4", {"group_size": 64, "zero": True}),
        ("int4", {"group_size": -1, "scale_dtype": torch.float32}),
    ],
)
def test_values_are_what_the_engine_computes_with(format: str, more: dict[str, Any]) -> None:
    layer = random_layer(Random(), format, EXPERTS, HIDDEN, INTERMEDIATE, **more)
    assert computable(layer.arguments)
    for name in ("w13", "w2"):
        wanted = layer.dequantised(name)
        # nvfp4 has two scales, and the order of multiplication decides the last bit.
        torch.testing.assert_close(values_of_all(layer.arguments, name), wanted, rtol=2e-7, atol=0)


def random_integers(bits: int, size: int, zero: bool, order: bool) -> dict[str, Any]:
    """What `integers.tensors` returns for random experts whose groups lk does not compute.

    The entry "wanted" has the float values of w13 and w2.
    """
    random = Random()
    codes, scales, zeros, orders, wanted = {}, {}, {}, {}, {}
    for name, parts, rows, columns in Shape(EXPERTS, HIDDEN, INTERMEDIATE, 2).matrices:
        groups = columns // size
        code = random.integers(0, 1 << bits, EXPERTS, rows, columns)
        middle = 1 << (bits - 1)
        scales[name] = random.uniform(0.5, 1.5, EXPERTS, rows, groups).bfloat16().float()
        of_zero = random.integers(0, 1 << bits, EXPERTS, rows, groups)
        order_of = (torch.arange(columns) // size).expand(EXPERTS, parts, -1)
        if order:
            shuffled = [torch.randperm(columns, generator=random.generator) for _ in range(6)]
            order_of = torch.stack(shuffled).view(EXPERTS, -1, columns)[:, :parts] // size
            orders[name] = order_of.int()
        along = order_of.repeat_interleave(rows // parts, 1)
        centre = of_zero.gather(2, along) if zero else middle
        wanted[name] = (code - centre).float() * scales[name].gather(2, along)
        if bits == 4:
            codes[name] = (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8)
        else:
            codes[name] = (code - 128).to(torch.int8)
        if zero:
            zeros[name] = (of_zero - (0 if bits == 4 else 128)).to(
                torch.uint8 if bits == 4 else torch.int8
            )
    return integers.tensors(bits, size, codes, scales, zeros, orders) | {"wanted": wanted}


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("bits", "size"), [(4, 8), (4, 16), (8, 16)])
def test_keep_converts_integers_that_the_engine_does_not_compute(
    bits: int, size: int, zero: bool, order: bool
) -> None:
    tensors = random_integers(bits, size, zero, order)
    wanted = tensors.pop("wanted")
    assert not computable(tensors)
    for name in ("w13", "w2"):
        assert torch.equal(values_of_all(tensors, name), wanted[name])
    made, _ = convert(Stored(tensors, bits), UseWeight.KEEP)
    for name in ("w13", "w2"):
        assert torch.equal(made[name], wanted[name].bfloat16())
    assert made["format"] == "bf16"


@pytest.mark.parametrize(("size", "group"), [(96, 32), (192, 64), (512, 128), (64, 64)])
def test_large_groups_become_several_groups_of_the_engine(size: int, group: int) -> None:
    """Each of these groups has a copy of the large group's scale."""
    random, columns = Random(), 2 * size
    codes = random.integers(0, 256, 2, 5, columns // 2).to(torch.uint8)
    scale = random.uniform(0.5, 1.5, 2, 5, 2).bfloat16()
    zero = random.integers(0, 16, 2, 5, 2).to(torch.uint8)
    found = integers.tensors(4, size, {"w13": codes}, {"w13": scale.float()}, {"w13": zero}, {})
    assert found["group_size"] == group
    assert found["w13_scale"].dtype == torch.bfloat16
    got = dequantise("int4", codes, found["w13_scale"], found["w13_zero"], group_size=group)
    assert torch.equal(got, dequantise("int4", codes, scale, zero, group_size=size))


def test_act_order_whose_groups_are_in_order() -> None:
    """The tensors are those of the second of two processes, whose groups begin in the middle."""
    random = Random()
    codes = random.integers(0, 256, 2, 6, 32).to(torch.uint8)
    scale = random.uniform(0.5, 1.5, 2, 6, 4)
    index = (torch.arange(64) // 32 + 2).int().expand(2, 1, -1)
    found = integers.tensors(4, 32, {"w2": codes}, {"w2": scale}, {}, {"w2": index})
    assert computable(found | {"w13_scale": scale})
    assert torch.equal(found["w2_scale"], scale[..., 2:])
    with pytest.raises(ValueError, match="w2: columns are in groups 2 to 4, of 0 to 3"):
        integers.tensors(4, 32, {"w2": codes}, {"w2": scale}, {}, {"w2": index + index % 2})


def test_keep_leaves_weights_that_the_engine_computes() -> None:
    """With act-order, only the loaded tensors show that their groups follow one another."""
    tensors = arguments("int4", 5, zero=True)
    made, _ = convert(Stored(tensors, 4), UseWeight.KEEP)
    assert made.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(made[name], value) if isinstance(value, torch.Tensor) else True
    assert made["format"] == "int4"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_to_dtype(format: str, dtype: torch.dtype) -> None:
    tensors = arguments(format, 1, bias=True)
    made, _ = convert(Stored(tensors), UseWeight.TO_DTYPE, dtype)
    assert made["format"] == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    for name in ("w13", "w2"):
        assert torch.equal(made[name], values_of_all(tensors, name).to(dtype))
        assert torch.equal(made[f"{name}_bias"], tensors[f"{name}_bias"])
        assert f"{name}_scale" not in made


@pytest.mark.parametrize("format", ["bf16", "fp16", "fp8", "int8", "nvfp4"])
def test_int4_quantises_the_values(format: str) -> None:
    """Rows of 80 and of 48 columns end in a group of 16, which zeros fill up to 32."""
    tensors = arguments(format, 2)
    made, _ = convert(Stored(tensors), UseWeight.INT4)
    assert made["format"] == "int4"
    assert made["group_size"] == 32
    for name, columns in (("w13", HIDDEN), ("w2", INTERMEDIATE)):
        padded = F.pad(values_of_all(tensors, name), (0, -columns % 32))
        codes, scale = quantize.int4(padded, 32)
        assert torch.equal(made[name], codes[..., : columns // 2])
        assert torch.equal(made[f"{name}_scale"], scale)


@pytest.mark.parametrize("format", ["bf16", "fp16"])
@pytest.mark.parametrize("target", [UseWeight.INT8, UseWeight.FP8])
def test_8_bits_with_a_scale_for_each_row(target: UseWeight, format: str) -> None:
    tensors = arguments(format, 6)
    made, _ = convert(Stored(tensors, 16), target)
    assert made["format"] == target.lower()
    assert computable(made)
    # Half a step of 127 for the largest weight of a row, or of e4m3's 3 bits for each weight.
    for name in ("w13", "w2"):
        wanted, got = values_of_all(tensors, name), values_of_all(made, name)
        assert made[f"{name}_scale"].shape == wanted.shape[:2]
        largest = wanted.abs().amax(2, keepdim=True)
        step = largest / 127 if target == UseWeight.INT8 else wanted.abs() / 8 + largest / 448 / 256
        assert ((got - wanted).abs() <= 0.505 * step).all()
    ExpertLayer(**made)


def test_int4_of_half_the_columns_is_half_of_the_int4_codes() -> None:
    """Tensor parallelism cuts w2's columns in whole groups, so the cut changes no code."""
    weight = Random().normal(5, 128)
    codes, scale = quantize.int4(weight, 32)
    for part in (0, 1):
        half = weight[:, 64 * part : 64 * part + 64]
        half_codes, half_scale = quantize.int4(half, 32)
        assert torch.equal(half_codes, codes[:, 32 * part : 32 * part + 32])
        assert torch.equal(half_scale, scale[:, 2 * part : 2 * part + 2])


def test_loaded_parameters_are_freed() -> None:
    _, layer = convert(Stored(arguments("fp8", 3)), UseWeight.INT4)
    assert {name for name, p in layer.named_parameters() if p.numel()} == {"w13_input_scale"}


def test_an_expert_with_nan_is_named() -> None:
    tensors = arguments("bf16", 4)
    tensors["w2"][1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=rf"^{NAME}: w2 of expert 1: .*NaN"):
        convert(Stored(tensors), UseWeight.INT4)


@pytest.mark.parametrize(
    ("bits", "computed", "setting", "target"),
    [
        (16, True, "KEEP", None),
        (16, True, "TO_DTYPE", None),
        (16, True, "INT4", "INT4"),
        (8, True, "KEEP", None),
        (8, True, "TO_DTYPE", "TO_DTYPE"),
        (8, True, "INT4", "INT4"),
        (8, False, "KEEP", "KEEP"),
        (4, True, "INT4", None),
        (4, False, "INT4", "INT4"),
        (4, True, "TO_DTYPE", "TO_DTYPE"),
        (16, True, "FP8", "FP8"),
        (8, True, "FP8", None),
        (8, False, "INT8", "INT8"),
        (4, True, "INT8", None),
    ],
)
def test_which_experts_are_converted(
    bits: int, computed: bool, setting: str, target: str | None
) -> None:
    source: Any = SimpleNamespace(bits=bits, computable=computed, arrives=True)
    chosen = choose(source, conversion(UseWeight(setting)), NAME)
    if target is None:
        assert chosen is source
    else:
        assert isinstance(chosen, Converted)
        assert chosen.conversion.target == UseWeight(target)


@pytest.mark.parametrize("target", [UseWeight.INT4, UseWeight.FP8, UseWeight.TO_DTYPE])
def test_dummy_weights_are_made_layer_by_layer(target: UseWeight) -> None:
    """There is no parameter before `tensors`, since vLLM would fill those of all layers at once."""
    layer = torch.nn.Module()
    converted = Converted(Unquantized(), conversion(target, dummy=True), NAME)
    converted.create_weights(layer, Shape(EXPERTS, HIDDEN, INTERMEDIATE, 2), torch.bfloat16, {})
    assert not list(layer.parameters())
    assert converted.tensors(layer)["w13"].float().abs().max() > 0

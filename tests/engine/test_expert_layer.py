"""lvllm.engine against float32 PyTorch, on random data and awkward shapes."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvllm import engine
from lvllm.engine import ExpertLayer, bank
from lvllm.engine.weight_formats import FORMATS as STORED
from tests.experts import ACTIVATIONS, E2M1, FORMATS, FOUR_BIT, Layer, Random, random_layer

SIZES = (1, 2, 7, 15, 16, 17, 31, 32, 33, 50, 64, 65, 100, 130, 257)
BOUND = {16: 3e-3, 8: 1.5e-2}
"""Relative Frobenius error by activation bits; rounding the result to bf16 alone is 1.7e-3."""
BOUND_OF_ROUNDED_X = 3.5e-3
"""Of float16 x where the CPU multiplies bf16: x is rounded as well."""


def runs_here(isa: str) -> bool:
    try:
        engine.configure(isa=isa)
    except ValueError:
        return False
    return True


ISAS = tuple(filter(runs_here, engine.ISAS))
WITHOUT_VNNI = tuple(isa for isa in ISAS if isa in ("portable", "avx2", "avx512"))
BOTH = tuple((name, bits) for name in FORMATS for bits in sorted(STORED[name].activation_bits))
"""Every format with every width of activations it has."""


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    yield
    engine.configure()


def even(format: str, size: int) -> int:
    """A size that the format allows: 4-bit formats hold two weights a byte."""
    return size + size % 2 if format in FOUR_BIT else size


class Case:
    """A layer of random weights with a random batch."""

    def __init__(
        self,
        tokens: int,
        hidden: int,
        intermediate: int,
        experts: int,
        topk: int,
        *,
        format: str = "bf16",
        x_dtype: torch.dtype = torch.bfloat16,
        skip: float = 0.0,
        seed: int = 0,
        **layer: Any,
    ) -> None:
        random = Random(seed)
        hidden, intermediate = even(format, hidden), even(format, intermediate)
        self.weights_of = random_layer(random, format, experts, hidden, intermediate, **layer)
        self.layer = self.weights_of.make()
        self.x = random.normal(tokens, hidden).to(x_dtype)
        self.ids = random.integers(0, experts, tokens, topk).int()
        self.ids[random.uniform(0, 1, tokens, topk) < skip] = -1
        self.weights = random.uniform(0.1, 1.1, tokens, topk)

    def run(self) -> torch.Tensor:
        return self.layer(self.x, self.ids, self.weights)

    def check(self) -> None:
        """The result has x's dtype and the promised accuracy.

        Errors of few values do not average out, and their sum may cancel. So below 2000 independent
        values or 32 of them a token, the bound is four times as wide and relative to outputs of the
        usual size, about 1.
        """
        got = self.run()
        assert got.dtype == self.x.dtype
        want = self.weights_of.reference(self.x, self.ids, self.weights)
        error, norm = (got.float() - want).norm(), want.norm()
        bound = BOUND[self.layer.activation_bits]
        if self.x.dtype == torch.float16 and engine.info().isa == "avx512_bf16":
            bound = max(bound, BOUND_OF_ROUNDED_X)
        active = int((self.ids >= 0).any(dim=1).sum())
        width = min(self.layer.hidden_size, self.layer.intermediate_size)
        if width < 32 or active * width < 2000:
            bound, norm = 4 * bound, norm + 0.3 * (active * self.layer.hidden_size) ** 0.5
        assert error <= bound * norm, f"relative error {error / norm:.2e}, bound {bound:.1e}"


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `Case`, all formats, activations and ragged sizes among them."""
    format = draw(st.sampled_from(FORMATS))
    activation = draw(st.sampled_from(ACTIVATIONS))
    return {
        "tokens": draw(st.sampled_from((0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 70, 300))),
        "hidden": draw(st.sampled_from(SIZES)),
        "intermediate": draw(st.sampled_from(SIZES)),
        "experts": draw(st.integers(1, 9)),
        "topk": draw(st.integers(1, 6)),
        "format": format,
        "x_dtype": draw(st.sampled_from((torch.bfloat16, torch.float16))),
        "skip": draw(st.sampled_from((0.0, 0.3, 1.0))),
        "seed": draw(st.integers(0, 2**31)),
        "activation": activation,
        "interleaved": activation != "relu2" and draw(st.booleans()),
        "swiglu_alpha": draw(st.sampled_from((1.702, 1.0))),
        "swiglu_beta": draw(st.sampled_from((1.0, 0.0))),
        "swiglu_limit": draw(st.sampled_from((7.0, 0.75))),
        "bias": draw(st.booleans()),
        "bias_dtype": draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32))),
        "apply_router_weight_on_input": draw(st.booleans()),
        "activation_bits": draw(st.sampled_from((None, *STORED[format].activation_bits))),
        "group_size": draw(st.sampled_from((32, 64, 128, -1))),
        "zero": draw(st.booleans()),
        "scale_dtype": draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32))),
        "fp8_scale": draw(st.sampled_from(("block", "channel", "tensor"))),
    }


@settings(max_examples=400, deadline=None)
@given(
    arguments=cases(),
    isa=st.sampled_from(ISAS),
    threads=st.sampled_from((None, 1, 2, 3)),
    topology=st.sampled_from(("", "2 nodes x 3,1 cores x 2 threads")),
)
def test_against_float32(
    arguments: dict[str, Any], isa: str, threads: int | None, topology: str
) -> None:
    engine.configure(isa=isa, threads=threads if topology else None, topology=topology)
    Case(**arguments).check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "bits"), BOTH)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "interleaved"])
def test_every_activation_with_biases(isa: str, format: str, bits: int, activation: str) -> None:
    engine.configure(isa=isa)
    Case(
        66,
        130,
        94,
        4,
        3,
        format=format,
        activation_bits=bits,
        activation="swigluoai" if activation == "interleaved" else activation,
        interleaved=activation == "interleaved",
        bias=True,
        swiglu_limit=1.5,
    ).check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "bits"), BOTH)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on_input", [False, True])
def test_dtypes_of_x_and_weights_on_input(
    isa: str, format: str, bits: int, x_dtype: torch.dtype, on_input: bool
) -> None:
    engine.configure(isa=isa)
    Case(
        200,
        256,
        192,
        3,
        2,
        format=format,
        activation_bits=bits,
        x_dtype=x_dtype,
        apply_router_weight_on_input=on_input,
    ).check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "bits"), BOTH)
@pytest.mark.parametrize(("hidden", "intermediate"), [(1024, 768), (2047, 33), (33, 2047)])
def test_sizes_of_real_layers(
    isa: str, format: str, bits: int, hidden: int, intermediate: int
) -> None:
    engine.configure(isa=isa)
    case = Case(64, hidden, intermediate, 3, 2, format=format, activation_bits=bits)
    case.check()
    case.x, case.ids, case.weights = case.x[:1], case.ids[:1], case.weights[:1]
    case.check()


@pytest.mark.parametrize(("format", "bits"), BOTH)
@pytest.mark.parametrize("experts", [1, 2, 512])
def test_from_one_to_512_experts(format: str, bits: int, experts: int) -> None:
    Case(90, 64, 32, experts, 10, format=format, activation_bits=bits).check()


@pytest.mark.parametrize(("format", "bits"), BOTH)
def test_thousands_of_tokens(format: str, bits: int) -> None:
    Case(3000, 130, 66, 4, 3, format=format, activation_bits=bits, skip=0.1).check()


@pytest.mark.parametrize("format", FORMATS)
def test_65536_tokens(format: str) -> None:
    Case(65536, 32, 16, 8, 2, format=format).check()


def test_more_tokens_than_one_pass() -> None:
    """Scratch for 256 MiB of slots is the limit of a pass; this batch needs several."""
    Case(9000, 1024, 8, 4, 6).check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "bits"), BOTH)
def test_threads_and_nodes_do_not_change_a_bit(isa: str, format: str, bits: int) -> None:
    engine.configure(isa=isa, threads=1)
    sizes = (1, 3, 67)
    made = [Case(m, 257, 130, 5, 3, format=format, activation_bits=bits, skip=0.1) for m in sizes]
    want = [case.run() for case in made]
    for topology in (
        "1 node x 2 cores x 1 threads",
        "1 node x 5 cores x 2 threads",
        "2 nodes x 3 cores x 2 threads",
        "3 nodes x 4,2,0 cores x 1 threads",
        "4 nodes x 1 cores x 1 threads",
        "8 nodes x 1,2,1,1,1,1,1,1 cores x 1 threads",
        "32 nodes x 1 cores x 1 threads",
    ):
        for threads in (None, 1):
            engine.configure(isa=isa, topology=topology, threads=threads)
            for case, expected in zip(made, want, strict=True):
                for _ in range(2):
                    assert torch.equal(case.run(), expected), topology


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "bits"), BOTH)
def test_a_token_does_not_depend_on_its_batch(isa: str, format: str, bits: int) -> None:
    engine.configure(isa=isa)
    case = Case(61, 130, 257, 2, 2, format=format, activation_bits=bits, bias=True)
    together = case.run()
    for part in (slice(0, 1), slice(17, 18), slice(60, 61), slice(3, 9), slice(20, 53)):
        alone = case.layer(case.x[part], case.ids[part], case.weights[part])
        assert torch.equal(alone, together[part])


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


# Every code of every format.


def test_e2m1_by_its_fields() -> None:
    """Sign, 2 bits of exponent (bias 1), 1 bit of mantissa; exponent 0 is subnormal."""
    for code, value in enumerate(E2M1.tolist()):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert value == (-size if sign else size)


ONE = {"fp8": 0x38, "int8": 1, "int4": 9, "mxfp4": 2, "nvfp4": 2}
ZERO = {"fp8": 0, "int8": 0, "int4": 8, "mxfp4": 0, "nvfp4": 0}


def unit_scales(format: str, name: str, rows: int, k: int) -> dict[str, torch.Tensor]:
    """Scales that are 1."""
    if format in ("fp8", "int8"):
        return {f"{name}_scale": torch.ones(1, rows)}
    if format == "int4":
        return {f"{name}_scale": torch.ones(1, rows, -(-k // 32))}
    if format == "mxfp4":
        return {f"{name}_scale": torch.full((1, rows, -(-k // 32)), 127, dtype=torch.uint8)}
    return {
        f"{name}_scale": torch.ones(1, rows, -(-k // 16)).to(torch.float8_e4m3fn),
        f"{name}_global_scale": torch.ones(1, 1) if name == "w13" else torch.ones(1),
    }


def stored(format: str, codes: torch.Tensor) -> torch.Tensor:
    """Codes [1, rows, K] as the format's tensor."""
    codes = codes.to(torch.uint8)
    if format in FOUR_BIT:
        return codes[..., 0::2] | codes[..., 1::2] << 4
    return codes.view(STORED[format].weight)


def layer_of_codes(format: str, w13: torch.Tensor, w2: torch.Tensor) -> Layer:
    """One expert of codes [rows, K] with scales of 1 and the activation relu(up)^2."""
    arguments: dict[str, Any] = {"format": format, "activation": "relu2"}
    if format == "int4":
        arguments["group_size"] = 32
    if 8 in STORED[format].activation_bits:
        arguments["activation_bits"] = 16
    for name, codes in (("w13", w13), ("w2", w2)):
        arguments |= {name: stored(format, codes[None])}
        arguments |= unit_scales(format, name, *codes.shape)
    return Layer(arguments)


def all_codes(format: str) -> torch.Tensor:
    """Codes [256, k] of every byte, k = 2 of 4 bits or 1 of 8; zeros instead of fp8's NaN."""
    raw = torch.arange(256)
    if format in FOUR_BIT:
        return torch.stack((raw & 15, raw >> 4), dim=-1)
    if format == "fp8":
        raw = raw.where(raw & 127 != 127, 0)
    return raw[:, None]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ONE)
def test_every_code_of_w2_by_itself(isa: str, format: str) -> None:
    """Every output is one weight, times 1."""
    engine.configure(isa=isa)
    codes = all_codes(format)
    k = codes.shape[1]
    w13 = torch.full((k, 256), ZERO[format]).fill_diagonal_(ONE[format])
    layer = layer_of_codes(format, w13, codes)
    x = torch.eye(k, 256).bfloat16()
    got = layer.make()(x, torch.zeros(k, 1).int(), torch.ones(k, 1))
    want = layer.dequantised("w2")[0].T
    torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ONE)
def test_every_code_of_w13_by_itself(isa: str, format: str) -> None:
    """Every output is the square of one weight, where that is positive, and of the negated one."""
    engine.configure(isa=isa)
    codes = all_codes(format)
    k = codes.shape[1]
    w13 = torch.full((256, 256), ZERO[format])
    w13[:, :k] = codes
    w2 = torch.full((256, 256), ZERO[format]).fill_diagonal_(ONE[format])
    layer = layer_of_codes(format, w13, w2)
    x = torch.cat((torch.eye(k, 256), -torch.eye(k, 256))).bfloat16()
    got = layer.make()(x, torch.zeros(2 * k, 1).int(), torch.ones(2 * k, 1))
    want = (x.float() @ layer.dequantised("w13")[0].T).relu().square()
    torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=0)


@pytest.mark.parametrize("isa", ISAS)
def test_every_scale_of_nvfp4(isa: str) -> None:
    """All positive e4m3 scales, subnormals included: an output each."""
    engine.configure(isa=isa)
    raw = torch.arange(127)
    w13 = torch.zeros(2, 127 + 1).int()
    w13[0, 0] = ONE["nvfp4"]
    codes = torch.full((128, 2), ONE["nvfp4"])
    layer = layer_of_codes("nvfp4", w13, codes)
    scale = layer.arguments["w2_scale"]
    scale[0, :127, 0] = raw.to(torch.uint8).view(torch.float8_e4m3fn)
    x = torch.zeros(1, 128).bfloat16()
    x[0, 0] = 1
    got = layer.make()(x, torch.zeros(1, 1).int(), torch.ones(1, 1))
    torch.testing.assert_close(got.float(), scale[:, :, 0].float(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fp8_scale", ["block", "channel", "tensor"])
def test_subnormal_fp8_weights_count(isa: str, fp8_scale: str) -> None:
    """Weights of which all are subnormal: codes 1 to 7 are 2^-9 to 7 * 2^-9."""
    engine.configure(isa=isa)
    case = Case(40, 257, 130, 3, 2, format="fp8", fp8_scale=fp8_scale)
    random = Random(1)
    for name in ("w13", "w2"):
        weight = case.weights_of.arguments[name]
        codes = random.integers(1, 8, *weight.shape) + 128 * random.integers(0, 2, *weight.shape)
        case.weights_of.arguments[name] = codes.to(torch.uint8).view(torch.float8_e4m3fn)
        case.weights_of.arguments[f"{name}_scale"] *= 60 / 4.5 * 2**9
    case.layer = case.weights_of.make()
    case.check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("scale", "x_exponent", "w2_exponent"), [(0, 100, 60), (254, -100, -60)])
def test_extreme_scales_of_mxfp4(isa: str, scale: int, x_exponent: int, w2_exponent: int) -> None:
    """2^-127, which is no normal float32, and 2^127, where the codes above 1.5 would overflow."""
    engine.configure(isa=isa)
    case = Case(40, 256, 128, 2, 1, format="mxfp4")
    arguments = case.weights_of.arguments
    arguments["w13"] &= 0xBB  # codes 0 to 3: 0, 0.5, 1, 1.5 and their negatives
    arguments["w13_scale"].fill_(scale)
    arguments["w2_scale"].fill_(127 + w2_exponent)
    case.x = case.x * 2.0**x_exponent
    case.layer = case.weights_of.make()
    want = case.weights_of.reference(case.x, case.ids, case.weights, torch.float64)
    assert want.isfinite().all()
    assert want.abs().max() > 1e-30
    assert (case.run() - want).norm() <= BOUND[16] * want.norm()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "bits"), BOTH)
def test_extreme_inputs(isa: str, format: str, bits: int) -> None:
    """Activations saturate without NaN, and NaN of x stays what it is, in its own row."""
    engine.configure(isa=isa)
    case = Case(4, 64, 32, 2, 1, format=format, activation_bits=bits)
    case.x[0] *= 1e4
    case.x[1] *= -1e4
    case.x[2, 3] = float("nan")
    case.weights[2] = 1
    got = case.run()
    assert got[:2].isfinite().all()
    assert got[2].isnan().all()
    case.x, case.ids, case.weights = case.x[3:], case.ids[3:], case.weights[3:]
    case.check()
    assert torch.equal(case.run(), got[3:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("format", "bits"), BOTH)
def test_zeros_and_tiny_inputs(isa: str, format: str, bits: int) -> None:
    """A block of zeros or of subnormal numbers has no scale that divides: biases come out."""
    engine.configure(isa=isa)
    case = Case(60, 128, 66, 2, 1, format=format, activation_bits=bits, bias=True)
    case.x[:20] = 0
    case.x[20:40] *= 2.0**-126
    case.x[40:, :64] = 0
    case.check()
    case = Case(1, 128, 66, 2, 1, format=format, activation_bits=bits)
    case.x.zero_()
    assert torch.equal(case.run(), case.x)


def test_strided_rows_and_int64_ids() -> None:
    case = Case(9, 100, 64, 4, 2)
    want = case.run()
    wide = torch.zeros(9, 130, dtype=torch.bfloat16)
    wide[:, 5:105] = case.x
    assert torch.equal(case.layer(wide[:, 5:105], case.ids.long(), case.weights), want)


@pytest.mark.parametrize("format", FORMATS)
def test_empty_batch_and_skipped_slots(format: str) -> None:
    case = Case(5, 64, 32, 2, 2, format=format, bias=True, skip=1.0)
    assert torch.equal(case.run(), torch.zeros(5, 64, dtype=torch.bfloat16))
    got = case.layer(case.x[:0], case.ids[:0], case.weights[:0])
    assert got.shape == (0, 64)
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.ids.fill_(7), r"topk_ids\[0, 0\] is 7, must be -1 \(skip\) to 3"),
        (lambda c: c.ids.fill_(-2), "is -2"),
        (lambda c: setattr(c, "ids", c.ids.long() + 2**40), "topk_ids"),
        (lambda c: setattr(c, "ids", c.ids.float()), "int32 or int64"),
        (lambda c: setattr(c, "ids", c.ids[:2]), "topk_ids"),
        (lambda c: setattr(c, "weights", c.weights.double()), "topk_weights.*float32"),
        (lambda c: setattr(c, "weights", c.weights[:, :1]), "topk_weights"),
        (lambda c: setattr(c, "x", c.x[:, :63]), "63.*hidden size is 64"),
        (lambda c: setattr(c, "x", c.x.float()), "x must be bfloat16 or float16"),
        (lambda c: setattr(c, "x", c.x[:, ::2]), "contiguous rows"),
    ],
)
def test_wrong_batches(change: object, message: str) -> None:
    case = Case(3, 64, 32, 4, 2)
    change(case)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        case.run()


def arguments_of(format: str, **changes: Any) -> dict[str, Any]:
    """A correct layer (2 experts, hidden 64, intermediate 32) with some arguments changed."""
    return random_layer(Random(), format, 2, 64, 32, bias=True).arguments | changes


def u8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("int3", {}, "format is 'int3', must be one of bf16, fp16, fp8, int8, int4, mxfp4, nvfp4"),
        ("bf16", {"activation": "relu"}, "activation is 'relu', must be one of silu, .*, relu2"),
        ("bf16", {"w13": torch.zeros(2, 64, 64)}, "w13 is torch.float32, wanted torch.bfloat16"),
        ("fp8", {"w2": u8(2, 64, 32)}, "w2 is torch.uint8, wanted torch.float8_e4m3fn"),
        ("int4", {"w2": u8(2, 64, 32)}, r"w2 has shape \(2, 64, 32\), .* wants \(2, 64, 16\)"),
        ("bf16", {"w13": torch.zeros(2, 63, 64).bfloat16()}, "w13 has 63 rows an expert"),
        ("int4", {"w13": u8(2, 62, 32)}, "w13 has 62 rows an expert, wanted a multiple of 4"),
        ("bf16", {"w13": torch.zeros(64, 64).bfloat16()}, r"w13 has shape \(64, 64\)"),
        ("bf16", {"w13": torch.zeros(2, 64, 0).bfloat16()}, r"w13 has shape \(2, 64, 0\)"),
        ("bf16", {"w13": torch.zeros(2, 64, 64).bfloat16().mT}, "w13 has strides"),
        ("bf16", {"w13": torch.zeros(2, 64, 64).bfloat16().to("meta")}, "w13 is on meta"),
        ("bf16", {"w2_scale": torch.zeros(2)}, "w2_scale was given, but format bf16 has none"),
        ("fp8", {"w13_scale": None}, "w13_scale is missing, format fp8 wants it"),
        (
            "fp8",
            {"w13_scale": torch.ones(2, 64, 64)},
            r"w13_scale has shape \(2, 64, 64\), wanted \(2, 1, 1\) or \(2, 64\) or \(2,\)",
        ),
        ("fp8", {"w2_scale": torch.ones(2, 64).double()}, "w2_scale is torch.float64, wanted .*32"),
        ("int8", {"w2_scale": torch.ones(2)}, r"w2_scale has shape \(2,\), wanted \(2, 64\)"),
        ("int8", {"w2_scale": torch.ones(64, 2).T}, "w2_scale has strides"),
        ("int4", {"w13_scale": torch.ones(2, 64)}, r"wanted \(2, 64, 2\)"),
        ("int4", {"group_size": -1}, r"w13_scale has .*, wanted \(2, 64, 1\) or \(2, 64\)"),
        ("int4", {"group_size": 16}, "group_size is 16, must be one of 32, 64, 128, -1"),
        ("mxfp4", {"group_size": 16}, "group_size is 16, but format mxfp4 has groups of 32"),
        ("fp8", {"group_size": 128}, "group_size is 128, but format fp8 has no groups"),
        ("int4", {"w13_zero": u8(2, 64, 2)}, "w13_zero was given, but w2_zero was not"),
        ("int4", {"w2_zero": u8(2, 64, 2)}, r"w2_zero has shape .*, wanted \(2, 64, 1\)"),
        ("int8", {"w2_zero": u8(2, 64)}, "w2_zero was given, but format int8 has no zero points"),
        ("mxfp4", {"w2_scale": torch.ones(2, 64, 1)}, "w2_scale is torch.float32, wanted .*uint8"),
        ("nvfp4", {"w2_scale": u8(2, 64, 2)}, "w2_scale is torch.uint8, wanted .*e4m3fn"),
        ("nvfp4", {"w2_global_scale": None}, "w2_global_scale is missing"),
        ("nvfp4", {"w13_global_scale": torch.ones(2)}, r"w13_global_scale has .* \(2, 2\)"),
        ("mxfp4", {"w13_global_scale": torch.ones(2, 2)}, "w13_global_scale was given"),
        ("bf16", {"w13_bias": torch.ones(2, 32)}, r"w13_bias has shape .*, wanted \(2, 64\)"),
        ("bf16", {"w2_bias": torch.ones(2, 64).int()}, "w2_bias is torch.int32, wanted"),
        ("bf16", {"interleaved": True, "activation": "relu2"}, "interleaved is True, but"),
        ("bf16", {"swiglu_limit": 0.0}, "swiglu_limit is 0.0, must be greater than 0"),
        ("bf16", {"swiglu_alpha": float("nan")}, "swiglu_alpha is nan, must be finite"),
        ("bf16", {"swiglu_beta": float("inf")}, "swiglu_beta is inf, must be finite"),
        ("bf16", {"activation_bits": 8}, "activation_bits of format bf16 is 8, must be one of 16"),
        ("int8", {"activation_bits": 4}, "activation_bits of .* is 4, must be one of 8, 16"),
    ],
)
def test_wrong_layers(format: str, changes: dict[str, Any], message: str) -> None:
    arguments = arguments_of("bf16" if format == "int3" else format, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        ExpertLayer(**(arguments | {"format": format}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
def test_release(format: str) -> None:
    arguments = arguments_of(format)
    tensors = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    layer = ExpertLayer(**(arguments | tensors))
    x, ids, weights = torch.ones(1, 64).bfloat16(), torch.zeros(1, 1).int(), torch.ones(1, 1)
    layer(x, ids, weights)
    layer.release()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.view(torch.uint8), arguments[name].view(torch.uint8)), name
    with pytest.raises(ValueError, match="names no expert layer"):
        layer(x, ids, weights)
    with pytest.raises(ValueError, match="names no expert layer"):
        layer.release()


def test_a_destroyed_layer_is_refused() -> None:
    layer = ExpertLayer(**arguments_of("bf16"))
    handle = layer.handle
    del layer
    x, ids, scale = torch.zeros(1, 64).bfloat16(), torch.zeros(1, 1).int(), torch.ones(1, 1)
    with pytest.raises(ValueError, match="names no expert layer"):
        torch.ops.lvllm.expert_block(x, ids, scale, handle)


def test_operator_is_sound() -> None:
    case = Case(3, 64, 32, 4, 2)
    torch.library.opcheck(
        torch.ops.lvllm.expert_block, (case.x, case.ids, case.weights, case.layer.handle)
    )


def test_compiles_without_graph_breaks() -> None:
    """Two layers share one compiled graph: the handle is an input of it, not a constant."""
    first, second = Case(3, 64, 32, 4, 2, seed=1), Case(3, 64, 32, 4, 2, seed=2)
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def model(x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.ops.lvllm.expert_block(x * 2, ids, w, h) + 1

    for case in (first, second):
        want = case.layer(case.x * 2, case.ids, case.weights) + 1
        assert torch.equal(model(case.x, case.ids, case.weights, case.layer.handle), want)
    assert graphs == 1


def test_calls_from_several_threads_take_turns() -> None:
    cases = [Case(m, 130, 64, 4, 2, seed=m) for m in (1, 2, 9, 33)]
    want = [case.run() for case in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(cases[i].run(), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter; hanging fails the test."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


PROGRAM = """
import os, torch
from lvllm import engine
torch.manual_seed(0)
w13, w2 = torch.randn(4, 64, 64).bfloat16(), torch.randn(4, 64, 32).bfloat16()
layer = engine.ExpertLayer(format="bf16", w13=w13, w2=w2)
x = torch.randn(2, 64).bfloat16()
call = lambda: layer(x, torch.zeros(2, 1).int(), torch.ones(2, 1))
first = call()
"""


def test_a_forked_child_computes_and_both_exit() -> None:
    got = run_python(
        PROGRAM
        + """
child = os.fork()
same = torch.equal(call(), first) and torch.equal(call(), first)
if child == 0:
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0 and same
print("both")
"""
    )
    assert (got.returncode, got.stdout) == (0, "both\n"), got.stderr


def test_exit_right_after_a_call() -> None:
    assert run_python(PROGRAM).returncode == 0


def test_isa_from_the_environment() -> None:
    got = run_python("from lvllm import engine; print(engine.info().isa)", LK_ISA="portable")
    assert got.stdout == "portable\n"
    got = run_python(
        "from lvllm import engine\ntry: engine.info()\nexcept ValueError as e: print(e)",
        LK_ISA="sse9",
    )
    assert got.stdout.startswith('LK_ISA is "sse9", must be one of those this CPU runs: portable')


@pytest.mark.parametrize("format", FORMATS)
def test_layers_on_bank_memory(format: str) -> None:
    """They compute on that memory: no byte more is allocated from the bank."""
    case = Case(5, 100, 60, 3, 2, format=format)
    arguments = dict(case.weights_of.arguments)
    for name, parts in (("w13", 2), ("w2", 1)):
        weight = arguments[name]
        arguments[name] = bank.allocate(weight.shape, weight.dtype, parts=parts)
        arguments[name].view(torch.uint8).copy_(weight.view(torch.uint8))
    before = bank.allocated_bytes()
    layer = ExpertLayer(**arguments)
    assert bank.allocated_bytes() == before
    assert torch.equal(layer(case.x, case.ids, case.weights), case.run())

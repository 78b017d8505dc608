"""Every code and extreme scale of every weight format, by the definition of the format."""

from typing import Any

import pytest
import torch

from lvllm import engine
from lvllm.engine.weight_formats import FORMATS as STORED
from tests.engine.random_case import BOUND, ISAS, Case
from tests.random_layers import E2M1, FOUR_BIT, Layer, Random

pytestmark = pytest.mark.usefixtures("default_settings")


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
    # Where weights are integers, activations may be rounded to 16 bits of the largest in a block.
    bound = 0 if format == "fp8" else 2**-16 * want.max().item()
    torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=bound)


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
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("scale", "x_exponent", "w2_exponent"), [(0, 100, 60), (254, -100, -60)])
def test_extreme_scales_of_mxfp4(
    isa: str, bits: int, scale: int, x_exponent: int, w2_exponent: int
) -> None:
    """2^-127, which is no normal float32, and 2^127, where the codes above 1.5 would overflow."""
    engine.configure(isa=isa)
    case = Case(40, 256, 128, 2, 1, format="mxfp4")
    arguments = case.weights_of.arguments
    arguments["w13"] &= 0xBB  # codes 0 to 3: 0, 0.5, 1, 1.5 and their negatives
    arguments["w13_scale"].fill_(scale)
    arguments["w2_scale"].fill_(127 + w2_exponent)
    case.x = case.x * 2.0**x_exponent
    case.layer = case.weights_of.make(activation_bits=bits)
    want = case.weights_of.reference(case.x, case.ids, case.weights, torch.float64)
    assert want.isfinite().all()
    assert want.abs().max() > 1e-30
    assert (case.run() - want).norm() <= BOUND[bits] * want.norm()

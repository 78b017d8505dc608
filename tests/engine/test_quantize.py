"""Quantisers against the meaning of their formats, and against the best that a search finds."""

import random
from collections.abc import Callable

import pytest
import torch

from lvllm.engine import quantize
from tests.random_layers import dequantise

SEED = random.randrange(1 << 30)
# Squared error of normally distributed weights over their sum of squares; 1% above what is seen.
ERRORS = {
    "int4": 0.0816,
    "int8": 0.0092,
    "fp8_channels": 0.0267,
    "fp8_blocks": 0.0267,
    "mxfp4": 0.1126,
    "nvfp4": 0.0879,
}


def quantized(
    name: str, weight: torch.Tensor, group: int = 32
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that a format makes of `weight` [E, N, K], and their values in float32."""
    if name == "int4":
        codes, scale = quantize.int4(weight, group)
        return {"codes": codes, "scale": scale}, dequantise("int4", codes, scale, group_size=group)
    made = getattr(quantize, name)(weight)
    codes, scale = made[:2]
    tensors = {"codes": codes, "scale": scale}
    more = {}
    if name == "nvfp4":
        more["global_scale"] = made[2].expand(len(weight))
    return tensors, dequantise(name.partition("_")[0], codes, scale, **more)


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED + seed)
    return torch.randn(*shape, generator=generator) * 0.02


def relative(values: torch.Tensor, weight: torch.Tensor) -> float:
    weight = weight.double()
    return ((values.double() - weight).square().sum() / weight.square().sum()).sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", sorted(ERRORS))
def test_error(name: str, dtype: torch.dtype) -> None:
    weight = random_weight(3, 200, 416).to(dtype)
    tensors, values = quantized(name, weight)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert values.shape == weight.shape
    assert relative(values, weight) < ERRORS[name]


@pytest.mark.parametrize(("group", "bound"), [(2, 0.024), (30, 0.081), (32, 0.0816), (416, 0.12)])
def test_int4_group_sizes(group: int, bound: float) -> None:
    # Enough weights that the error of a sample is within 0.2% of the mean error.
    weight = random_weight(24, 64, 480 if group == 30 else 416)
    tensors, values = quantized("int4", weight, group)
    assert tensors["codes"].shape == (24, 64, weight.shape[2] // 2)
    assert tensors["scale"].shape == (24, 64, weight.shape[2] // group)
    assert relative(values, weight) < bound


def test_int4_is_close_to_the_best_scales() -> None:
    """Against every bfloat16 scale between a sixteenth and a quarter of a group's largest."""
    weight = random_weight(400, 32)
    _, values = quantized("int4", weight[None])
    error = (values[0] - weight).square().sum(1)
    largest = weight.abs().amax(1, keepdim=True)
    best = torch.full((400,), torch.inf)
    for factor in torch.linspace(1 / 16, 1 / 4, 400).tolist():
        for sign in (1, -1):
            scale = (largest * factor * sign).bfloat16().float()
            tried = (weight / scale).round().clamp(-8, 7) * scale
            best = torch.minimum(best, (tried - weight).square().sum(1))
    # A single group may be 1.7 times its best; over 300 draws 98% of the groups stayed within 1.13.
    assert (error / best).quantile(0.98) < 1.2
    assert error.sum() < 1.02 * best.sum()
    plain = (largest / 7).bfloat16().float()
    rounded = (weight / plain).round().clamp(-8, 7) * plain
    assert error.sum() < 0.74 * (rounded - weight).square().sum()


def test_mxfp4_takes_the_better_exponent() -> None:
    weight = random_weight(1, 300, 64)
    tensors, values = quantized("mxfp4", weight)
    error = (values - weight).square().view(300, 2, 32).sum(-1)
    for change in (-1, 1):
        scale = tensors["scale"].to(torch.int16) + change
        unit = torch.exp2(scale[0].float() - 127).unsqueeze(-1)
        tried = nearest_e2m1(weight.view(300, 2, 32) / unit) * unit
        other = (tried - weight.view(300, 2, 32)).square().sum(-1)
        # One step off is worse, or is not one of the two that the standard allows for.
        assert (error <= other * (1 + 1e-5)).float().mean() > 0.99


def nearest_e2m1(values: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    index = (values.abs().unsqueeze(-1) - table).abs().argmin(-1)
    return table[index] * values.sign()


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda x: quantized("mxfp4", x)[1], [6, 0.25, 0.75, -1.25, 1.75, 2.5, -3.5, 5, -5]),
        (lambda x: quantized("nvfp4", x)[1], [2688, 112, 336, -560, 784, 1120, -1568, 2240, -2240]),
    ],
)
def test_ties_go_to_even_codes(
    make: Callable[[torch.Tensor], torch.Tensor], values: list[float]
) -> None:
    """Of e2m1, in units of the largest weight's scale."""
    weight = torch.zeros(1, 1, 32)
    weight[0, 0, : len(values)] = torch.tensor(values)
    unit = values[0] / 6
    expected = torch.tensor([6, 0, 1, -1, 2, 2, -4, 4, -4]) * unit
    assert torch.equal(make(weight)[0, 0, : len(values)], expected)


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_awkward_values(name: str) -> None:
    """Groups of zeros, near both ends of float32's range, of one weight alone, of equal ones."""
    weight = random_weight(1, 7, 256)
    weight[0, 1] = 0
    weight[0, 2, 1:] = 0
    weight[0, 3] = -0.5
    assert relative(quantized(name, weight)[1][:, 2], weight[:, 2]) < 0.21  # 5 is 4 or 6 in e2m1
    assert torch.equal(quantized(name, weight)[1][0, 1], torch.zeros(256))
    for magnitude in (1e-37, 1e-30, 1e30, 1e37, 3e38):
        scaled = weight / weight.abs().max() * magnitude
        tensors, values = quantized(name, scaled)
        assert torch.isfinite(tensors["scale"].float()).all()
        assert torch.isfinite(values).all()
        if magnitude > 1e-30:  # below, weights may be taken for zero
            assert relative(values / magnitude, scaled / magnitude) < 2 * ERRORS[name]
    _, zeros = quantized(name, torch.zeros(1, 3, 256))
    assert torch.equal(zeros, torch.zeros(1, 3, 256))


@pytest.mark.parametrize("name", sorted(ERRORS))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_no_numbers_are_refused(name: str, bad: float) -> None:
    weight = random_weight(1, 5, 64)
    weight[0, 4, 63] = bad
    with pytest.raises(ValueError, match=r"^weight holds NaN or infinity$"):
        quantized(name, weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: quantize.int4(w, 64), "weight has 96 columns, no multiple of the group size 64"),
        (lambda w: quantize.int4(w, 3), "group_size is 3, must be positive and even"),
        (lambda w: quantize.mxfp4(w[:, :40]), "weight has 40 columns, no multiple of the group"),
        (lambda w: quantize.nvfp4(w[:, :40]), "weight has 40 columns, no multiple of the group"),
        (lambda w: quantize.fp8_blocks(w[0]), r"weight has shape (96,), wanted [..., N, K]"),
    ],
)
def test_refusals(call: Callable[[torch.Tensor], object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call(random_weight(4, 96))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_blocks_of_work_do_not_change_a_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do threads, nor strides, nor what stands beside a matrix."""
    weight = random_weight(2, 384, 256)
    whole, _ = quantized(name, weight)
    monkeypatch.setattr(quantize, "_elements", lambda weight: 1000)
    turned = weight.transpose(0, 1).contiguous().transpose(0, 1)
    pieces, _ = quantized(name, turned)
    for key, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), pieces[key].view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", sorted(ERRORS))
def test_a_gpu_gives_the_same_bits(name: str) -> None:
    weight = random_weight(4, 512, 768).bfloat16()
    here = getattr(quantize, name)(*((weight, 32) if name == "int4" else (weight,)))
    there = weight.cuda()
    gpu = getattr(quantize, name)(*((there, 32) if name == "int4" else (there,)))
    for a, b in zip(here, gpu, strict=True):
        assert torch.equal(a.view(torch.uint8), b.cpu().view(torch.uint8))

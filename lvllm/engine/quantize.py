"""Quantise floating-point weights into the engine's formats.

The docstring of `ExpertLayer` describes each format.

    codes, scale = int4(weight, group_size)     # uint8 [..., K/2], bfloat16 [..., K/g]
    codes, scale = int8(weight)                 # int8 [..., K], float32 [...]
    codes, scale = fp8_channels(weight)         # float8_e4m3fn [..., K], float32 [...]
    codes, scale = fp8_blocks(weight)           # float32 [..., N/128, K/128] rounded up
    codes, scale = mxfp4(weight)                # uint8 [..., K/2], uint8 [..., K/32]
    codes, scale, global_scale = nvfp4(weight)  # uint8 [..., K/2], float8_e4m3fn [..., K/16], []

`weight` is bfloat16, float16 or float32 [..., K] on any device. All functions round to nearest
even, and raise ValueError for NaN, infinity and a K that is no multiple of the group size. They
work block by block, so beside their result they take only 4 MiB for each thread on the CPU, and
0.3 GiB on a GPU.

The result has the same bits on every device, because only three kinds of operations are used:
those that round each element by itself, exact ones (maxima, powers of two), and sums in a fixed
order. In particular nothing is divided by a Python number, which CUDA turns into a product; no
`alpha` is used; and no reduction is used but `amax` and `amin`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from lvllm.units import ceil_div

__all__ = [
    "fp8_blocks",
    "fp8_channels",
    "int4",
    "int8",
    "mxfp4",
    "nvfp4",
    "nvfp4_global_scale",
]

INT4_LARGEST = (7.25, 7.75, 8.25, 8.75)
"""The sizes of a group's largest weight, in units of the scale, that are tried before the scale is
fitted.

With these four, the squared error of normal weights in groups of 32 is 0.701 of the error of
rounding by absmax / 7. With (7.75, 8.5) it is 0.713, with eight sizes 0.698, and with 560 scales
tried one by one 0.696.
"""
E2M1_LARGEST = 6.0
E4M3_LARGEST = 448.0
E4M3_SMALLEST = 2.0**-9
NEGLIGIBLE = 2.0**-100
"""A group or row whose weights are all smaller becomes zeros, so that scales and their inverses
stay normal floats."""
BLOCK = 128
"""Rows and columns that share a scale in blockwise fp8."""


def int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 4-bit weights: codes uint8 [..., K/2], scale bfloat16 [..., K/group_size].

    A byte holds two codes, the even K in the low nibble; a weight is (code - 8) * scale. There is
    one more code below 8 than above it. A scale has the sign that puts the group's largest weight
    below 8, which takes 10% off the squared error. Each size of INT4_LARGEST gives a set of codes
    and the scale that fits these codes best; the scale with the least squared error is taken.
    """
    groups = _groups(weight, group_size)
    codes = groups.new_empty((len(groups), group_size // 2), dtype=torch.uint8)
    scale = groups.new_empty(len(groups), dtype=torch.bfloat16)
    for rows, x, scratch, products in _columns(groups, 3):
        low, high = x.amin(0), x.amax(0)
        largest = torch.where(high > -low, high, low)
        _check_finite(largest)
        dead = largest.abs() < NEGLIGIBLE
        largest.masked_fill_(dead, -8)
        unit = largest * -0.125
        inverse = unit.reciprocal().masked_fill_(dead, 0)
        x.mul_(inverse)  # -8 to 8
        best_gain, best = torch.full_like(unit, -1), torch.ones_like(unit)
        for units in INT4_LARGEST:
            torch.mul(x, units / 8, out=scratch)
            scratch.round_().clamp_(-8, 7)
            cross = _sum(torch.mul(x, scratch, out=products)).clone()
            square = _sum(scratch.square_()).clamp_min_(1)
            fitted = (cross / square).mul_(unit).bfloat16().float()
            # The gain is by how much these codes and that scale lower the error.
            relative = fitted * inverse
            gain = (cross * 2).sub_(square.mul_(relative)).mul_(relative)
            better = gain > best_gain
            torch.where(better, gain, best_gain, out=best_gain)
            torch.where(better, fitted, best, out=best)
        best.masked_fill_(dead, 1)
        x.mul_(unit.div_(best)).round_().clamp_(-8, 7)
        _pack(x.add_(8), products, codes[rows])
        scale[rows] = best.bfloat16()
    return _shaped(codes, weight), _shaped(scale, weight)


def int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 8-bit weights from -127 to 127: codes int8 [..., K], scale float32 [...].

    Each row has one scale, a value that bfloat16 can hold.
    """
    return _by_rows(weight, 127.0, torch.int8)


def fp8_channels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 weights [..., K] and a float32 scale [...] for each row, a value that bfloat16 holds."""
    return _by_rows(weight, E4M3_LARGEST, torch.float8_e4m3fn)


def fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 weights [..., N, K] and a float32 scale for each block of 128 x 128; blocks at the edges
    are smaller.
    """
    if weight.dim() < 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, wanted [..., N, K]")
    rows, columns = weight.shape[-2:]
    down, across = ceil_div(rows, BLOCK), ceil_div(columns, BLOCK)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = weight.new_empty((*weight.shape[:-2], down, across), dtype=torch.float32)
    step = max(1, _elements(weight) // (BLOCK * BLOCK * across)) * BLOCK
    for matrix, of_matrix, by in zip(
        weight.reshape(-1, rows, columns),
        codes.view(-1, rows, columns),
        scale.view(-1, down, across),
        strict=True,
    ):
        for start in range(0, rows, step):
            band = matrix[start : start + step]
            height = len(band)
            padded = F.pad(band.float(), (0, -columns % BLOCK, 0, -height % BLOCK))
            blocks = padded.view(-1, BLOCK, across, BLOCK)
            of_band = _scale(blocks.abs().amax((1, 3)), E4M3_LARGEST)
            by[start // BLOCK :][: len(of_band)] = of_band
            blocks.div_(of_band[:, None, :, None]).clamp_(-E4M3_LARGEST, E4M3_LARGEST)
            of_matrix[start : start + step] = padded[:height, :columns].to(codes.dtype)
    return codes, scale


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e2m1 codes with powers of two as scales, as OCP Microscaling Formats 1.0 defines them.

    Codes are uint8 [..., K/2], the even K in the low nibble; scales are uint8 [..., K/32], the
    exponent plus 127. Two exponents are tried, and the one with the smaller squared error is taken:
    the exponent of the group's largest weight less 2, as the standard says, and one more than that,
    with which that weight is not clipped.
    """
    groups = _groups(weight, 32)
    codes = groups.new_empty((len(groups), 16), dtype=torch.uint8)
    scale = groups.new_empty(len(groups), dtype=torch.uint8)
    for rows, *buffers in _columns(groups, 4):
        x, scratch = buffers[:2]
        largest = torch.abs(x, out=scratch).amax(0)
        _check_finite(largest)
        dead = largest < NEGLIGIBLE
        largest.masked_fill_(dead, 4)
        x.masked_fill_(dead, 0)
        exponent = (largest.view(torch.int32) >> 23) - 2
        choices = [exponent, (exponent + 1).clamp_max_(252)]  # 6 * 2^126 would be infinite.
        second = _best_e2m1(buffers, [(e << 23).view(torch.float32) for e in choices])
        _pack(x, scratch, codes[rows])
        scale[rows] = torch.where(second, choices[1], choices[0]).to(torch.uint8)
    return _shaped(codes, weight), _shaped(scale, weight)


def nvfp4(
    weight: torch.Tensor, global_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """e2m1 codes with e4m3 scales, and one float32 scale over all of them (NVIDIA's NVFP4).

    Codes are uint8 [..., K/2], the even K in the low nibble; scales are float8_e4m3fn [..., K/16].
    The global scale is by default the one that fits the whole tensor. A group's largest weight
    becomes 6 or 4, whichever has the smaller squared error.
    """
    groups = _groups(weight, 16)
    if global_scale is None:
        global_scale = nvfp4_global_scale(weight)
    codes = groups.new_empty((len(groups), 8), dtype=torch.uint8)
    scale = groups.new_empty(len(groups), dtype=torch.float8_e4m3fn)
    for rows, *buffers in _columns(groups, 4):
        x, scratch = buffers[:2]
        largest = torch.abs(x, out=scratch).amax(0)
        _check_finite(largest)
        relative = largest / global_scale
        choices = [
            (relative * factor).clamp_(E4M3_SMALLEST, E4M3_LARGEST).to(scale.dtype)
            for factor in (1 / 6, 1 / 4)
        ]
        units = [choice.float().mul_(global_scale) for choice in choices]
        second = _best_e2m1(buffers, units)
        _pack(x, scratch, codes[rows])
        scale[rows] = torch.where(second, choices[1], choices[0])
    return _shaped(codes, weight), _shaped(scale, weight), global_scale


def nvfp4_global_scale(*weights: torch.Tensor) -> torch.Tensor:
    """The smallest global scale, a float32, with which e4m3 scales reach the largest weight."""
    largest = torch.stack([torch.maximum(w.amax(), -w.amin()).float() for w in weights]).amax()
    _check_finite(largest)
    scale = largest * (1 / (E4M3_LARGEST * E2M1_LARGEST))
    return torch.where(largest < NEGLIGIBLE, torch.ones_like(scale), scale)


def _by_rows(
    weight: torch.Tensor, most: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of `dtype` whose absolute value is at most `most`, and a float32 scale for each row."""
    matrix = weight.reshape(-1, weight.shape[-1])
    codes = torch.empty(matrix.shape, dtype=dtype, device=weight.device)
    scale = torch.empty(len(matrix), dtype=torch.float32, device=weight.device)
    step = max(1, _elements(weight) // matrix.shape[1])
    shape = (min(step, len(matrix)), matrix.shape[1])
    buffer = torch.empty(shape, dtype=torch.float32, device=weight.device)
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        x = buffer[: len(matrix[rows])].copy_(matrix[rows])
        # Checkpoints keep scales in bfloat16. The scale is rounded before the codes are made, so
        # that the codes fit the rounded scale.
        scale[rows] = _scale(torch.maximum(x.amax(1), -x.amin(1)), most).bfloat16().float()
        x.div_(scale[rows, None]).clamp_(-most, most)
        codes[rows].copy_(x.round_() if dtype == torch.int8 else x)
    return codes.view(weight.shape), scale.view(weight.shape[:-1])


def _scale(largest: torch.Tensor, most: float) -> torch.Tensor:
    _check_finite(largest)
    return torch.where(largest < NEGLIGIBLE, torch.ones_like(largest), largest * (1 / most))


def _groups(weight: torch.Tensor, size: int) -> torch.Tensor:
    columns = weight.shape[-1]
    if size <= 0 or size % 2:
        raise ValueError(f"group_size is {size}, must be positive and even")
    if columns % size:
        raise ValueError(f"weight has {columns} columns, no multiple of the group size {size}")
    return weight.reshape(-1, size)


def _shaped(flat: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Codes or scales, one group after the other, in the shape [..., n] of the weight."""
    return flat.view(*weight.shape[:-1], -1)


def _elements(weight: torch.Tensor) -> int:
    """How many weights to work on at a time: as many as fit in the cores' caches, or fill a GPU."""
    return torch.get_num_threads() << 18 if weight.device.type == "cpu" else 1 << 24


def _columns(groups: torch.Tensor, count: int) -> Iterator[tuple[Any, ...]]:
    """Iterate over some groups at a time.

    Yields their slice, and `count` float32 buffers of [group_size, groups]. The first buffer holds
    the groups, the others are scratch space. The groups lie along the last dimension, so that each
    operation works on vectors of groups. The buffers are used again and again: new ones would cost
    as much in page faults as 20 operations on them.
    """
    total, size = groups.shape
    step = max(1, _elements(groups) // size)
    shape = (count, size * min(step, total))
    memory = torch.empty(shape, dtype=torch.float32, device=groups.device)
    for start in range(0, total, step):
        some = groups[start : start + step]
        buffers = memory[:, : some.numel()].unflatten(1, (size, len(some))).unbind()
        buffers[0].copy_(some.t())
        yield slice(start, start + step), *buffers


def _sum(terms: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, [n, m] -> [m], which overwrites `terms`.

    The terms are added in halves, and not by PyTorch's sum, whose order differs by device.
    """
    left = len(terms)
    while left > 1:
        half = left // 2
        terms[:half].add_(terms[half : 2 * half])
        if left % 2:
            terms[0].add_(terms[left - 1])
        left = half
    return terms[0]


def _best_e2m1(buffers: list[torch.Tensor], units: list[torch.Tensor]) -> torch.Tensor:
    """Turn each column of the first buffer [n, m] into codes by the better of two units [m].

    Returns for each column whether the second unit was the better one.
    """
    x, size, step, value = buffers
    errors = []
    for unit in units:
        _to_e2m1(torch.div(x, unit, out=size).abs_(), step, value)
        error = _sum(value.sub_(size).square_())
        errors.append((unit / units[0]).square_().mul_(error))
    second = errors[1] < errors[0]
    x.div_(torch.where(second, units[1], units[0]))
    _to_e2m1(torch.abs(x, out=size), step, value)
    # The values 0, 0.5, 1, 1.5, 2, 3, 4, 6 have the codes 0 to 7. A code is the smallest of
    # 2 * value, value + 2 and value / 2 + 4. The code of a negative value is larger by 8.
    torch.mul(value, 2, out=size)
    torch.minimum(size, torch.add(value, 2, out=step), out=size)
    torch.minimum(size, value.mul_(0.5).add_(4), out=size)
    torch.lt(x, 0, out=step)
    torch.add(size, step.mul_(8), out=x)
    return second


def _to_e2m1(size: torch.Tensor, step: torch.Tensor, out: torch.Tensor) -> None:
    """The e2m1 values nearest to `size`. They are 0.5 apart up to 2, 1 up to 4, and 2 up to 6."""
    exponent = 0xFF << 23
    torch.bitwise_and(size.view(torch.int32), exponent, out=step.view(torch.int32))
    step.mul_(0.5).clamp_min_(0.5)
    torch.div(size, step, out=out).round_().mul_(step).clamp_(max=E2M1_LARGEST)


def _pack(codes: torch.Tensor, scratch: torch.Tensor, out: torch.Tensor) -> None:
    """Pack codes from 0 to 15, which are floats [n, m], into uint8 [m, n/2]."""
    pairs = torch.mul(codes[1::2], 16, out=scratch[: len(codes) // 2])
    out.copy_(pairs.add_(codes[0::2]).t())


def _check_finite(largest: torch.Tensor) -> None:
    if not torch.isfinite(largest).all():
        raise ValueError("weight holds NaN or infinity")

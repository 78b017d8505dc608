"""The Triton kernel behind `lvllm.gpu.convert`. It is imported only where it runs."""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from lvllm.engine.tiles import TILE_ROWS, WEIGHT_UNIT
from lvllm.engine.weight_formats import BLOCK, FORMATS

COLUMNS = 64
"""The columns of a block. With 64 rows, each thread of four warps has at most 16 values."""


@triton.jit
def _small_float(  # type: ignore[no-untyped-def]
    code, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr
):
    """uint8 -> float32. This is arithmetic, since GPUs before sm_89 have no such instruction."""
    exponent = ((code >> MANTISSA) & ((1 << (BITS - 1 - MANTISSA)) - 1)).to(tl.int32)
    # Subnormals have no leading one, and the exponent of the smallest normal numbers.
    mantissa = (code & ((1 << MANTISSA) - 1)).to(tl.int32) + tl.where(
        exponent > 0, 1 << MANTISSA, 0
    )
    power = tl.maximum(exponent, 1) - BIAS - MANTISSA
    value = mantissa.to(tl.float32) * ((power + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(code >= (1 << (BITS - 1)), -value, value)


@triton.jit
def _e4m3(code):  # type: ignore[no-untyped-def]
    return _small_float(code, 8, 3, 7)


@triton.jit
def _e2m1(code):  # type: ignore[no-untyped-def]
    return _small_float(code, 4, 1, 1)


@triton.jit
def _e8m0(code):  # type: ignore[no-untyped-def]
    """uint8 -> float32. The code is a float32 exponent, but 0 means half of what 1 means."""
    bits = code.to(tl.int32)
    power = (tl.maximum(bits, 1) << 23).to(tl.float32, bitcast=True)
    return tl.where(bits == 0, power * 0.5, power)


@triton.jit
def _convert(  # type: ignore[no-untyped-def]
    weights,
    scale,
    zero,
    global_scale,
    out,
    rows,  # per part
    columns,
    length,  # of a row, in stored elements
    groups,  # per row; for block scales, blocks per row
    group_size,
    PARTS: tl.constexpr,
    FORMAT: tl.constexpr,
    VALUES: tl.constexpr,  # per stored element
    UNIT: tl.constexpr,  # stored elements that stay together in a tile
    SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Convert one block of a tile. The grid is (experts * parts, tiles, blocks)."""
    matrix = tl.program_id(0).to(tl.int64)  # Offsets in a layer exceed 32 bits.
    tile = tl.program_id(1)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    first = tile * ROWS
    n = tl.minimum(rows - first, ROWS)
    inside = (row < n) & (column < columns)

    element = column // VALUES
    whole = length // UNIT * UNIT
    in_units = (element // UNIT * n + row) * UNIT + element % UNIT
    leftover = n * whole + row * (length - whole) + element - whole
    at = (matrix * rows + first) * length + tl.where(element < whole, in_units, leftover)
    stored = tl.load(weights + at, mask=inside, other=0)
    if VALUES == 2:
        stored = tl.where(column % 2 == 0, stored & 15, stored >> 4)
    if FORMAT == "fp8":
        value = _e4m3(stored)
    elif FORMAT == "mxfp4" or FORMAT == "nvfp4":
        value = _e2m1(stored)
    else:
        value = stored.to(tl.float32)

    if SCALE == "group":
        group = column // group_size
        at_group = (matrix * rows + first) * groups + group * n + row
        if FORMAT == "int4":
            middle = 8.0
            if ZERO:
                middle = tl.load(zero + at_group, mask=inside, other=0).to(tl.float32)
            value -= middle
        factor = tl.load(scale + at_group, mask=inside, other=0)
        if FORMAT == "mxfp4":
            factor = _e8m0(factor)
        elif FORMAT == "nvfp4":
            factor = _e4m3(factor) * tl.load(global_scale + matrix)
        else:
            factor = factor.to(tl.float32)
        value *= factor
    elif SCALE == "row":
        value *= tl.load(scale + matrix * rows + first + row, mask=row < n, other=0)
    elif SCALE == "block":
        block_row = (matrix % PARTS * rows + first + row) // BLOCK
        blocks = (PARTS * rows + BLOCK - 1) // BLOCK
        at_block = (matrix // PARTS * blocks + block_row) * groups + column // BLOCK
        value *= tl.load(scale + at_block, mask=inside, other=0)
    elif SCALE == "tensor":
        value *= tl.load(scale + matrix // PARTS)

    tl.store(
        out + (matrix * rows + first + row) * columns + column,
        value.to(out.dtype.element_ty),
        mask=inside,
    )


def run(
    format: str, group_size: int, parts: int, part: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """Convert the tensors of one projection, by their suffixes, as `convert.convert` says."""
    stored, scale = part[""], part.get("_scale")
    per_element = FORMATS[format].values
    experts, rows, length = stored.shape
    out = torch.empty((experts, rows, length * per_element), dtype=dtype, device=stored.device)
    of_part, columns = rows // parts, out.shape[2]
    codes = stored.element_size() == 1 and format != "int8"
    nothing = stored  # This stands for arguments that the format does not have.
    grid = (experts * parts, triton.cdiv(of_part, TILE_ROWS), triton.cdiv(columns, COLUMNS))
    _convert[grid](
        stored.view(torch.uint8) if codes else stored,
        nothing if scale is None else _codes(scale),
        part.get("_zero", nothing),
        part.get("_global_scale", nothing),
        out,
        of_part,
        columns,
        length,
        1 if scale is None or scale.dim() < 3 else scale.shape[2],
        group_size,
        PARTS=parts,
        FORMAT=format,
        VALUES=per_element,
        UNIT=WEIGHT_UNIT // stored.element_size(),
        SCALE=_scale_kind(scale, group_size),
        ZERO="_zero" in part,
        ROWS=TILE_ROWS,
        COLUMNS=COLUMNS,
        BLOCK=BLOCK,
    )
    return out


def _scale_kind(scale: torch.Tensor | None, group_size: int) -> str:
    """Tell which weights share a scale."""
    if scale is None:
        return "none"
    return "group" if group_size else {1: "tensor", 2: "row", 3: "block"}[scale.dim()]


def _codes(scale: torch.Tensor) -> torch.Tensor:
    """View e4m3 scales as bytes."""
    return scale.view(torch.uint8) if scale.element_size() == 1 else scale

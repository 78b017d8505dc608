"""Reads a block of an expert's weights, which lie in the engine's order and format.

The order is that of `lvllm.engine.tiles`. A tile of n rows holds unit 0 of its rows, then unit 1 of
its rows, and so on. A unit is a word of four bytes, so that neighbouring threads read neighbouring
words. A word is unpacked in registers: no converted matrix is ever written to memory.
"""

import triton
import triton.language as tl

from lvllm.gpu.kernels import block_weights

__all__ = ["read"]


@triton.jit
def _e4m3(code):  # type: ignore[no-untyped-def]
    """int32 -> float32. GPUs before sm_89 have no instruction for it.

    A half float has the same fields, with one more bit in the exponent and 7 more in the mantissa.
    Its exponent is 8 larger, subnormal numbers included.
    """
    bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _e2m1(code):  # type: ignore[no-untyped-def]
    """int32 -> float32, as `_e4m3` does it. The exponent of a half float is 14 larger."""
    bits = ((code & 8) << 12) | ((code & 7) << 9)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _e8m0(code):  # type: ignore[no-untyped-def]
    """int32 -> float32. The code is a float32's exponent, but 0 means half of what 1 means."""
    power = (tl.maximum(code, 1) << 23).to(tl.float32, bitcast=True)
    return tl.where(code == 0, power * 0.5, power)


@triton.jit
def _unpack(words, FORMAT: tl.constexpr, VALUES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Unpack int32 [units, rows] -> [units * VALUES, rows], in 16 bits if they are stored so.

    4-bit codes become their float32 values only where these need no scale and no zero point.
    """
    BITS: tl.constexpr = 32 // VALUES
    shift = (tl.arange(0, VALUES) * BITS)[None, :, None]
    parts = words[:, None, :] >> shift
    if FORMAT == "bf16":
        value = parts.to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif FORMAT == "fp16":
        value = parts.to(tl.int16).to(tl.float16, bitcast=True)
    elif FORMAT == "int8":
        value = parts.to(tl.int8).to(tl.float32)
    elif FORMAT == "fp8":
        value = _e4m3(parts & 0xFF)
    elif FORMAT == "int4":
        value = (parts & 15).to(tl.float32)
    else:
        value = _e2m1(parts & 15)
    return tl.reshape(value, (words.shape[0] * VALUES, words.shape[1]))


@triton.jit
def _spread(groups, GROUP: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Repeat what groups share for each of their columns: [groups, rows] -> [COLUMNS, rows].

    One group has all columns, and stays [1, rows]. Triton compiles what follows a return within an
    if, so this has only one.
    """
    rows: tl.constexpr = groups.shape[1]
    if groups.shape[0] == 1:
        repeated = groups
    else:
        several = tl.broadcast_to(groups[:, None, :], (groups.shape[0], GROUP, rows))
        repeated = tl.reshape(several, (COLUMNS, rows))
    return repeated


@triton.jit
def read(  # type: ignore[no-untyped-def]
    words,  # int32 [experts * PARTS, rows, length], in tiles
    scale,
    zero,
    global_scale,
    expert,
    part,
    tile,
    column,  # the first one of the block
    rows,  # per part
    columns,
    groups,  # per row; for scales of blocks, blocks per row
    PARTS: tl.constexpr,
    FORMAT: tl.constexpr,
    VALUES: tl.constexpr,  # per word
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale; at least COLUMNS, if not a divisor of it
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,  # of a block
    BLOCK: tl.constexpr,  # rows and columns that share a scale
    DTYPE: tl.constexpr,
):
    """Read a block of a tile, transposed -> [COLUMNS, ROWS] of DTYPE.

    Weight and scale are multiplied in float32, and then rounded. What lies beyond the matrix is
    finite, but need not be 0.
    """
    matrix = expert.to(tl.int64) * PARTS + part  # Offsets in a layer exceed 32 bits.
    if SCALE == "in blocks":
        value = block_weights.read(
            words, scale, zero, matrix, tile, column, rows, columns, FORMAT, ROWS, COLUMNS
        )
    else:
        value = _read_words(
            words, scale, zero, global_scale, expert, matrix, part, tile, column, rows, columns,
            groups, PARTS, FORMAT, VALUES, SCALE, GROUP, ZERO, ROWS, COLUMNS, BLOCK,
        )  # fmt: skip
    return value.to(DTYPE)


@triton.jit
def _read_words(  # type: ignore[no-untyped-def]
    words,
    scale,
    zero,
    global_scale,
    expert,
    matrix,  # of all experts' parts
    part,
    tile,
    column,
    rows,
    columns,
    groups,
    PARTS: tl.constexpr,
    FORMAT: tl.constexpr,
    VALUES: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Read a block in a format whose scales lie in a tensor of their own. See `read`."""
    first = tile * ROWS
    row = tl.arange(0, ROWS)[None, :]
    n = tl.minimum(rows - first, ROWS)
    units = columns // VALUES
    unit = column // VALUES + tl.arange(0, COLUMNS // VALUES)[:, None]
    stored = tl.load(
        words + (matrix * rows + first) * units + unit * n + row,
        mask=(row < n) & (unit < units),
        other=0,
    )
    value = _unpack(stored, FORMAT, VALUES)
    if SCALE == "group":
        SCALES: tl.constexpr = COLUMNS // GROUP if GROUP < COLUMNS else 1
        group = column // GROUP + tl.arange(0, SCALES)[:, None]
        at = (matrix * rows + first) * groups + group * n + row
        inside = (row < n) & (group < groups)
        if FORMAT == "int4":
            if ZERO:
                middle = tl.load(zero + at, mask=inside, other=0).to(tl.float32)
                value -= _spread(middle, GROUP, COLUMNS)
            else:
                value -= 8.0
        factor = tl.load(scale + at, mask=inside, other=0)
        if FORMAT == "mxfp4":
            factor = _e8m0(factor.to(tl.int32))
        elif FORMAT == "nvfp4":
            factor = _e4m3(factor.to(tl.int32)) * tl.load(global_scale + matrix)
        value *= _spread(factor.to(tl.float32), GROUP, COLUMNS)
    elif SCALE == "row":
        value *= tl.load(scale + matrix * rows + first + row, mask=row < n, other=0)
    elif SCALE == "block":
        block_row = (part * rows + first + row) // BLOCK
        blocks = (PARTS * rows + BLOCK - 1) // BLOCK
        at = (expert.to(tl.int64) * blocks + block_row) * groups + column // BLOCK
        value *= tl.load(scale + at, mask=row < n, other=0)
    elif SCALE == "tensor":
        value *= tl.load(scale + expert)
    return value

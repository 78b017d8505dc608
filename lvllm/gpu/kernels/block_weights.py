"""Reads weights of GGUF's types, whose blocks lie in the engine's order (csrc/lk/blocks.h).

A tile of n rows holds the units of codes of its rows, then the words that scales are made from, and
then the halves. Each of these is transposed in words of four bytes and halves of two, so that
neighbouring threads read neighbouring words.
"""

import triton
import triton.language as tl

from lvllm.engine.weight_formats import BLOCK_FORMATS
from lvllm.gpu.kernels import block_codes

__all__ = ["FORMATS", "read"]

FORMATS = tuple(block_codes.FORMATS)
"""The block formats that can be read."""
UNIT: tl.constexpr = tl.constexpr(16)
"""The weights of a unit."""


@triton.constexpr_function
def _bits(format):  # type: ignore[no-untyped-def]
    """The bits of a weight among its unit's codes."""
    return block_codes.FORMATS[format][0]


@triton.constexpr_function
def _block_weights(format):  # type: ignore[no-untyped-def]
    return BLOCK_FORMATS[format].block_weights


@triton.constexpr_function
def _block_bytes(format):  # type: ignore[no-untyped-def]
    return BLOCK_FORMATS[format].block_bytes


@triton.constexpr_function
def _word_bytes(format):  # type: ignore[no-untyped-def]
    """The bytes of a block in words that scales are made from."""
    return block_codes.FORMATS[format][1]


@triton.jit
def read(  # type: ignore[no-untyped-def]
    words,  # int32 [experts * PARTS * rows * bytes of a row / 4], in tiles
    halves,  # the same as int16
    matrix,  # int64: how many matrices of `rows` lie before this one
    tile,
    column,  # the first one of the block
    rows,  # of a matrix; an even number
    columns,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile
    COLUMNS: tl.constexpr,  # of a block
):
    """Read a block of a tile, transposed -> float32 [COLUMNS, ROWS].

    What lies beyond the matrix is 0.
    """
    BITS: tl.constexpr = _bits(FORMAT)
    BLOCK: tl.constexpr = _block_weights(FORMAT)
    WORDS: tl.constexpr = _word_bytes(FORMAT)
    UNIT_BYTES: tl.constexpr = UNIT * BITS // 8
    HALVES: tl.constexpr = _block_bytes(FORMAT) - WORDS - BLOCK * BITS // 8
    first = tile * ROWS
    n = tl.minimum(rows - first, ROWS)
    row = tl.arange(0, ROWS)[None, :]
    unit = column // UNIT + tl.arange(0, COLUMNS // UNIT)[:, None]
    block = unit // (BLOCK // UNIT)
    blocks = columns // BLOCK
    inside = (row < n) & (block < blocks)
    # Rows are an even number, and so are the bytes of all parts of a block. Hence pairs of rows are
    # whole words.
    pair = n // 2
    start = (matrix * rows + first) // 2 * (blocks * (_block_bytes(FORMAT) // 2))
    codes = unit * (UNIT_BYTES // 2) * pair
    at = (blocks * (BLOCK * BITS // 16) + block * (WORDS // 2)) * pair
    ends = (blocks * ((BLOCK * BITS // 8 + WORDS) // 2) + block * (HALVES // 2)) * pair
    words += start
    halves += 2 * start
    values, scale, low = block_codes.read(
        words + codes + row,
        halves + 2 * codes + row,
        words + at + row,
        halves + 2 * ends + row,
        unit,
        n,
        inside,
        FORMAT,
        BITS,
    )
    values = values * scale[:, None, :] - low[:, None, :]
    return tl.reshape(values, (COLUMNS, ROWS))

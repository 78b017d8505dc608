"""Reads weights of GGUF's types, whose blocks lie in the engine's order (csrc/lk/blocks.h).

A tile of n rows holds the units of codes of its rows, then the words that scales are made from, and
then the halves. Each of these is transposed in words of four bytes and halves of two, so that
neighbouring threads read neighbouring words.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from lvllm.engine.weight_formats import BLOCK_FORMATS
from lvllm.gpu.kernels import block_codes, block_entries
from lvllm.gpu.kernels.codebooks import LOOKED_UP

__all__ = ["read"]


@dataclass(frozen=True)
class _Layout:
    """How lk keeps a block."""

    unit: int
    """How many weights a unit has."""
    unit_bytes: int
    word_bytes: int
    """The bytes of the words that scales are made from. The rest of a block is in halves."""


LAYOUTS = tl.constexpr(
    {
        "q2_k": _Layout(16, 4, 20),
        "q3_k": _Layout(16, 6, 12),
        "q4_k": _Layout(16, 8, 16),
        "q5_k": _Layout(16, 10, 16),
        "q6_k": _Layout(16, 12, 16),
        "q4_1": _Layout(16, 8, 4),
        "q5_0": _Layout(16, 10, 0),
        "q5_1": _Layout(16, 10, 4),
        "iq4_nl": _Layout(16, 8, 0),
        "iq4_xs": _Layout(16, 8, 8),
        "iq1_s": _Layout(32, 4, 16),
        "iq1_m": _Layout(16, 2, 24),
        "iq2_xxs": _Layout(32, 4, 32),
        "iq2_xs": _Layout(16, 4, 8),
        "iq2_s": _Layout(16, 4, 16),
        "iq3_xxs": _Layout(32, 8, 32),
        "iq3_s": _Layout(32, 12, 12),
    }
)
"""A constant of Triton, so that a change makes it compile the kernels anew."""


@triton.constexpr_function
def _is_looked_up(format):  # type: ignore[no-untyped-def]
    return format in LOOKED_UP


@triton.constexpr_function
def _weights(format):  # type: ignore[no-untyped-def]
    """The weights of a block."""
    return BLOCK_FORMATS[format].block_weights


@triton.constexpr_function
def _unit(format):  # type: ignore[no-untyped-def]
    """The weights of a unit."""
    return LAYOUTS.value[format].unit


@triton.constexpr_function
def _unit_bytes(format):  # type: ignore[no-untyped-def]
    return LAYOUTS.value[format].unit_bytes


@triton.constexpr_function
def _word_bytes(format):  # type: ignore[no-untyped-def]
    return LAYOUTS.value[format].word_bytes


@triton.constexpr_function
def _half_bytes(format):  # type: ignore[no-untyped-def]
    stored, layout = BLOCK_FORMATS[format], LAYOUTS.value[format]
    units = stored.block_weights // layout.unit
    return stored.block_bytes - units * layout.unit_bytes - layout.word_bytes


@triton.jit
def read(  # type: ignore[no-untyped-def]
    words,  # int32 [experts * PARTS * rows * bytes of a row / 4], in tiles
    halves,  # the same as int16
    codebook,  # int32, of types whose codes are entries of a table
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
    WEIGHTS: tl.constexpr = _weights(FORMAT)
    UNIT: tl.constexpr = _unit(FORMAT)
    UNIT_BYTES: tl.constexpr = _unit_bytes(FORMAT)
    WORD_BYTES: tl.constexpr = _word_bytes(FORMAT)
    HALF_BYTES: tl.constexpr = _half_bytes(FORMAT)
    CODE_BYTES: tl.constexpr = WEIGHTS // UNIT * UNIT_BYTES  # of a block
    first = tile * ROWS
    n = tl.minimum(rows - first, ROWS)
    row = tl.arange(0, ROWS)[None, :]
    # Whatever the format, 16 weights are unpacked at a time.
    sixteen = column // 16 + tl.arange(0, COLUMNS // 16)[:, None]
    blocks = columns // WEIGHTS
    block = sixteen // (WEIGHTS // 16)
    inside = (row < n) & (block < blocks)
    # All parts of a block have even numbers of bytes, and tiles have even numbers of rows. So two
    # rows of a part are whole words.
    pairs = n // 2
    start = (matrix * rows + first) // 2 * (blocks * ((CODE_BYTES + WORD_BYTES + HALF_BYTES) // 2))
    code = sixteen // (UNIT // 16) * (UNIT_BYTES // 2) * pairs
    word = (blocks * (CODE_BYTES // 2) + block * (WORD_BYTES // 2)) * pairs
    half = (blocks * ((CODE_BYTES + WORD_BYTES) // 2) + block * (HALF_BYTES // 2)) * pairs
    words += start
    halves += 2 * start
    unit_words, unit_halves = words + code + row, halves + 2 * code + row
    block_words, block_halves = words + word + row, halves + 2 * half + row
    if _is_looked_up(FORMAT):
        values, scale = block_entries.read(
            unit_words, unit_halves, block_words, block_halves, codebook, sixteen, n, inside, FORMAT
        )
        values *= scale[:, None, :]
    else:
        values, scale, low = block_codes.read(
            unit_words, unit_halves, block_words, block_halves, sixteen, n, inside, FORMAT,
            UNIT_BYTES // 2,
        )  # fmt: skip
        values = values * scale[:, None, :] - low[:, None, :]
    return tl.reshape(values, (COLUMNS, ROWS))

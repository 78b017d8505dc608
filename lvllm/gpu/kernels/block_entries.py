"""Weights of GGUF's types whose codes are entries of a table: IQ1, IQ2 and IQ3.

An entry has the numbers of four or eight weights (csrc/lk/blocks.h). Those of IQ2 and IQ3 are
magnitudes, and signs are with the codes. Four weights are looked up at a time, since their numbers
are a word of the table (codebooks.py).

All functions unpack 16 weights of each row at a time, half of a unit where units have 32. They take
the arguments of `read`, and most of them return numbers, [sixteens, 4, 4, rows], and a scale's
integer, [sixteens, rows].
"""

import triton
import triton.language as tl

from lvllm.gpu.kernels.block_codes import half_to_float

__all__ = ["read"]

SIGN = tl.constexpr(-(1 << 31))
"""The sign of a float32."""


@triton.jit
def _signs(sevens):  # type: ignore[no-untyped-def]
    """The 16 signs of two times seven bits, the eighth of which makes the number of ones even."""
    bits = (sevens & 0x7F) | ((sevens << 1) & 0x7F00)
    parity = bits ^ ((bits >> 4) & 0x0707)
    parity ^= parity >> 2
    parity ^= parity >> 1
    return bits | ((parity & 0x0101) << 7)


@triton.jit
def _numbers(table):  # type: ignore[no-untyped-def]
    """The bytes of words: int32 [sixteens, 4, rows] -> int8 [sixteens, 4, 4, rows]."""
    byte = tl.arange(0, 4)[None, None, :, None]
    return (table[:, :, None, :] >> 8 * byte).to(tl.int8)


@triton.jit
def _signed(table, signs):  # type: ignore[no-untyped-def]
    """Magnitudes with the signs of bits 0 to 15 -> float32 [sixteens, 4, 4, rows]."""
    four, byte = tl.arange(0, 4)[None, :, None, None], tl.arange(0, 4)[None, None, :, None]
    minus = (signs[:, None, None, :] << (31 - 4 * four - byte)) & SIGN
    value = _numbers(table).to(tl.float32).to(tl.int32, bitcast=True)
    return (value ^ minus).to(tl.float32, bitcast=True)


@triton.jit
def _nibble(words, sixteen, n, inside):  # type: ignore[no-untyped-def]
    """Four bits of words that have them for each of a block's 16 weights."""
    word = tl.load(words + sixteen % 16 // 8 * n, mask=inside, other=0)
    return (word >> 4 * (sixteen % 8)) & 15


@triton.jit
def _iq2_xxs(unit_words, words, codebook, sixteen, n, inside):  # type: ignore[no-untyped-def]
    """Four bytes of entries; the block has a word for each unit: signs, and a scale."""
    four = tl.arange(0, 4)[None, :, None]
    half = sixteen % 2
    entries = tl.load(unit_words, mask=inside, other=0) >> 16 * half
    index = (entries[:, None, :] >> 8 * (four // 2)) & 255
    rest = tl.load(words + sixteen // 2 % 8 * n, mask=inside, other=0)
    signs = _signs(rest >> 14 * half)
    return _signed(tl.load(codebook + 2 * index + four % 2), signs), (rest >> 28) & 15


@triton.jit
def _iq2_xs(unit_words, words, codebook, sixteen, n, inside):  # type: ignore[no-untyped-def]
    """Two entries of nine bits, each below seven bits of signs; scales are nibbles."""
    four = tl.arange(0, 4)[None, :, None]
    unit = tl.load(unit_words, mask=inside, other=0)
    index = (unit[:, None, :] >> 16 * (four // 2)) & 511
    signs = _signs(((unit >> 9) & 0x7F) | ((unit >> 25) << 7))
    table = tl.load(codebook + 2 * index + four % 2)
    return _signed(table, signs), _nibble(words, sixteen, n, inside)


@triton.jit
def _iq2_s(unit_words, words, codebook, sixteen, n, inside):  # type: ignore[no-untyped-def]
    """Two bytes of entries and two of signs; nibbles have two more bits of each; so are scales."""
    four = tl.arange(0, 4)[None, :, None]
    unit = tl.load(unit_words, mask=inside, other=0)
    high = _nibble(words, sixteen, n, inside)[:, None, :] >> 2 * (four // 2)
    index = ((unit[:, None, :] >> 8 * (four // 2)) & 255) | ((high & 3) << 8)
    table = tl.load(codebook + 2 * index + four % 2)
    return _signed(table, unit >> 16), _nibble(words + 2 * n, sixteen, n, inside)


@triton.jit
def _iq3_xxs(unit_words, words, codebook, sixteen, n, inside):  # type: ignore[no-untyped-def]
    """Eight bytes of entries; the block has a word for each unit: signs, and a scale."""
    four = tl.arange(0, 4)[None, :, None]
    half = sixteen % 2
    entries = tl.load(unit_words + half * n, mask=inside, other=0)
    index = (entries[:, None, :] >> 8 * four) & 255
    rest = tl.load(words + sixteen // 2 % 8 * n, mask=inside, other=0)
    return _signed(tl.load(codebook + index), _signs(rest >> 14 * half)), (rest >> 28) & 15


@triton.jit
def _iq3_s(unit_words, words, codebook, sixteen, n, inside):  # type: ignore[no-untyped-def]
    """Eight bytes of entries, four of signs; a byte has their ninth bits; scales are nibbles."""
    four = tl.arange(0, 4)[None, :, None]
    unit, half = sixteen // 2 % 8, sixteen % 2
    entries = tl.load(unit_words + half * n, mask=inside, other=0)
    high = tl.load(words + unit // 4 * n, mask=inside, other=0) >> (8 * (unit % 4) + 4 * half)
    index = ((entries[:, None, :] >> 8 * four) & 255) | (((high[:, None, :] >> four) & 1) << 8)
    signs = tl.load(unit_words + 2 * n, mask=inside, other=0) >> 16 * half
    scale = (tl.load(words + 2 * n, mask=inside, other=0) >> 4 * unit) & 15
    return _signed(tl.load(codebook + index), signs), scale


@triton.jit
def _iq1(codebook, index, minus):  # type: ignore[no-untyped-def]
    """Eight times the weights of entries, to which 1 is added, or subtracted if `minus` is 1."""
    four = tl.arange(0, 4)[None, :, None]
    numbers = _numbers(tl.load(codebook + 2 * index + four % 2)).to(tl.float32)
    return numbers + (1 - 2 * minus).to(tl.float32)[:, :, None, :]


@triton.jit
def _iq1_s(unit_words, words, codebook, sixteen, n, inside):  # type: ignore[no-untyped-def]
    """Four bytes of entries; the block has a half of a word for each unit.

    It has three more bits of each entry, a scale, and whether 1/8 is subtracted.
    """
    four = tl.arange(0, 4)[None, :, None]
    unit, half = sixteen // 2 % 8, sixteen % 2
    entries = tl.load(unit_words, mask=inside, other=0) >> 16 * half
    rest = tl.load(words + unit // 2 * n, mask=inside, other=0) >> 16 * (unit % 2)
    high = (rest >> 6 * half)[:, None, :] >> 3 * (four // 2)
    index = ((entries[:, None, :] >> 8 * (four // 2)) & 255) | ((high & 7) << 8)
    return _iq1(codebook, index, ((rest >> 15) & 1)[:, None, :]), (rest >> 12) & 7


@triton.jit
def _iq1_m(unit_halves, words, codebook, sixteen, n, inside):  # type: ignore[no-untyped-def]
    """Two bytes of entries; the block has a byte for each unit.

    It has for each entry three more bits, and whether 1/8 is subtracted. Words 4 and 5 have three
    bits of scales for each unit. The high four bits of their halves are the block's factor.
    """
    four = tl.arange(0, 4)[None, :, None]
    unit = sixteen % 16
    entries = tl.load(unit_halves, mask=inside, other=0).to(tl.int32)
    rest = tl.load(words + unit // 4 * n, mask=inside, other=0) >> 8 * (unit % 4)
    high = rest[:, None, :] >> 4 * (four // 2)
    index = ((entries[:, None, :] >> 8 * (four // 2)) & 255) | ((high & 7) << 8)
    low_word = tl.load(words + 4 * n, mask=inside, other=0)
    high_word = tl.load(words + 5 * n, mask=inside, other=0)
    factor = ((low_word >> 12) & 0xF) | ((low_word >> 24) & 0xF0)
    factor |= ((high_word >> 4) & 0xF00) | ((high_word >> 16) & 0xF000)
    own = tl.where(unit < 8, low_word, high_word)
    scale = (own >> (16 * (unit // 4 % 2) + 3 * (unit % 4))) & 7
    return _iq1(codebook, index, (high >> 3) & 1), scale, half_to_float(factor)


@triton.jit
def read(  # type: ignore[no-untyped-def]
    unit_words, unit_halves, words, halves, codebook, sixteen, n, inside, FORMAT: tl.constexpr
):  # fmt: skip
    """Read 16 weights of each row -> float32 [sixteens, 16, rows], and scales [sixteens, rows].

    Args:
        unit_words: where the first word of the weights' unit is, [sixteens, rows].
        unit_halves: where its first half is.
        words: where the first word is that scales of their block are made from.
        halves: the same, of halves.
        codebook: the table (codebooks.py).
        sixteen: the number of the 16 weights in a row, [sixteens, 1].
        n: the distance between two words of one row.
        inside: which of the weights there are, [sixteens, rows].
        FORMAT: the format.
    """
    if FORMAT == "iq1_m":
        numbers, scale, factor = _iq1_m(unit_halves, words, codebook, sixteen, n, inside)
    else:
        factor = half_to_float(tl.load(halves, mask=inside, other=0))
    if FORMAT == "iq1_s":
        numbers, scale = _iq1_s(unit_words, words, codebook, sixteen, n, inside)
    elif FORMAT == "iq2_xxs":
        numbers, scale = _iq2_xxs(unit_words, words, codebook, sixteen, n, inside)
    elif FORMAT == "iq2_xs":
        numbers, scale = _iq2_xs(unit_words, words, codebook, sixteen, n, inside)
    elif FORMAT == "iq2_s":
        numbers, scale = _iq2_s(unit_words, words, codebook, sixteen, n, inside)
    elif FORMAT == "iq3_xxs":
        numbers, scale = _iq3_xxs(unit_words, words, codebook, sixteen, n, inside)
    elif FORMAT == "iq3_s":
        numbers, scale = _iq3_s(unit_words, words, codebook, sixteen, n, inside)
    if FORMAT != "iq3_s":
        factor *= 1 / 4 if FORMAT == "iq3_xxs" else 1 / 8
    values = tl.reshape(numbers, (numbers.shape[0], 16, numbers.shape[3]))
    return values, factor * (2 * scale + 1).to(tl.float32)

"""Weights of GGUF's types whose codes are numbers: K-quants, Q4_1, Q5_0, Q5_1, IQ4_NL and IQ4_XS.

The order of codes in a unit of 16, and what scales are made from, is that of csrc/lk/blocks.h.
Scales of a group are computed for each unit, so that they are in the threads that have the unit's
codes, and threads exchange nothing.
"""

import triton
import triton.language as tl

__all__ = ["half_to_float", "read"]


def _packed(*values: int) -> tl.constexpr:
    """Eight integers of 8 bits in one of 64 bits, the first one in the low byte."""
    return tl.constexpr(
        int.from_bytes(bytes(value & 255 for value in values), "little", signed=True)
    )


IQ4_LOW = _packed(-127, -104, -83, -65, -49, -35, -22, -10)
IQ4_HIGH = _packed(1, 13, 25, 38, 53, 69, 89, 113)
"""The integers of IQ4_NL and IQ4_XS."""


@triton.jit
def half_to_float(bits):  # type: ignore[no-untyped-def]
    """The float16 in the low 16 bits of integers, as float32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _codes(words, halves, n, inside, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Unpack codes of 2 to 6 bits -> int32 [sixteens, 16, rows]."""
    weight = tl.arange(0, 16)[None, :, None]
    pair = 8 * (weight // 2 % 4) + 4 * (weight // 8) + 2 * (weight % 2)  # its two bits of a word
    first = tl.load(words, mask=inside, other=0)[:, None, :]
    if BITS >= 4:
        second = tl.load(words + n, mask=inside, other=0)[:, None, :]
        codes = (tl.where(weight < 8, first, second) >> 4 * (weight % 8)) & 15
    else:
        codes = (first >> pair) & 3
    if BITS == 6:
        high = tl.load(words + 2 * n, mask=inside, other=0)[:, None, :]
        codes |= ((high >> pair) & 3) << 4
    elif BITS % 2:
        after: tl.constexpr = 4 if BITS == 5 else 2
        high = tl.load(halves + after * n, mask=inside, other=0).to(tl.int32)[:, None, :]
        codes |= ((high >> pair // 2) & 1) << (BITS - 1)
    return codes


@triton.jit
def _iq4(codes):  # type: ignore[no-untyped-def]
    """Look codes of 4 bits up among 16 integers, in registers -> float32."""
    eight = tl.where(codes < 8, tl.cast(IQ4_LOW, tl.int64), tl.cast(IQ4_HIGH, tl.int64))
    return (eight >> (8 * (codes & 7)).to(tl.int64)).to(tl.int8).to(tl.float32)


@triton.jit
def _six_bits(words, n, inside, group):  # type: ignore[no-untyped-def]
    """Scale and minimum of Q4_K and Q5_K.

    Eight of both have 6 bits. Those of groups 0 to 3 are the low bits of the bytes of words 1 and
    2. Word 3 has the low four bits of the others, whose high bits are above those of the first.
    """
    factors = tl.load(words, mask=inside, other=0)
    scales = tl.load(words + n, mask=inside, other=0) >> 8 * (group % 4)
    minimums = tl.load(words + 2 * n, mask=inside, other=0) >> 8 * (group % 4)
    rest = tl.load(words + 3 * n, mask=inside, other=0) >> 8 * (group % 4)
    scale = tl.where(group < 4, scales & 63, (rest & 15) | ((scales >> 2) & 48))
    minimum = tl.where(group < 4, minimums & 63, ((rest >> 4) & 15) | ((minimums >> 2) & 48))
    scale = half_to_float(factors) * scale.to(tl.float32)
    return scale, half_to_float(factors >> 16) * minimum.to(tl.float32)


@triton.jit
def _nibble_pairs(words, n, inside, group):  # type: ignore[no-untyped-def]
    """Scale and minimum of Q2_K, the nibbles of a byte."""
    byte = tl.load(words + group // 4 * n, mask=inside, other=0) >> 8 * (group % 4)
    factors = tl.load(words + 4 * n, mask=inside, other=0)
    scale = half_to_float(factors) * (byte & 15).to(tl.float32)
    return scale, half_to_float(factors >> 16) * ((byte >> 4) & 15).to(tl.float32)


@triton.jit
def _signed_six_bits(words, halves, n, inside, group):  # type: ignore[no-untyped-def]
    """Scale of Q3_K: words 0 and 1 have the low four bits, word 2 the high two, less 32."""
    part, byte = group // 4, 8 * (group % 4)
    low = tl.load(words + part % 2 * n, mask=inside, other=0) >> byte >> 4 * (part // 2)
    high = tl.load(words + 2 * n, mask=inside, other=0) >> byte >> 2 * part
    scale = (((low & 15) | ((high & 3) << 4)) - 32).to(tl.float32)
    return half_to_float(tl.load(halves, mask=inside, other=0)) * scale


@triton.jit
def _signed_bytes(words, halves, n, inside, group):  # type: ignore[no-untyped-def]
    """Scale of Q6_K, a signed byte."""
    byte = tl.load(words + group // 4 * n, mask=inside, other=0) >> 8 * (group % 4)
    return half_to_float(tl.load(halves, mask=inside, other=0)) * byte.to(tl.int8).to(tl.float32)


@triton.jit
def _split_six_bits(words, n, inside, group):  # type: ignore[no-untyped-def]
    """Scale of IQ4_XS: the high two bits are beside the factor, the others in word 1, less 32."""
    first = tl.load(words, mask=inside, other=0)
    low = tl.load(words + n, mask=inside, other=0) >> 4 * group
    scale = (((low & 15) | (((first >> 16 >> 2 * group) & 3) << 4)) - 32).to(tl.float32)
    return half_to_float(first) * scale


@triton.jit
def read(  # type: ignore[no-untyped-def]
    unit_words, unit_halves, words, halves, sixteen, n, inside, FORMAT: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Read 16 weights of each row -> their values, scales, and what is subtracted, in float32.

    Args:
        unit_words: where the first word of the weights is, [sixteens, rows].
        unit_halves: where their first half is.
        words: where the first word is that scales of their block are made from.
        halves: the same, of halves.
        sixteen: the number of the 16 weights in a row, [sixteens, 1].
        n: the distance between two words of one row.
        inside: which of the weights there are, [sixteens, rows].
        FORMAT: the format.
        BITS: of a code.

    Returns:
        [sixteens, 16, rows], and twice [sixteens, rows].
    """
    codes = _codes(unit_words, unit_halves, n, inside, BITS)
    low = tl.zeros(inside.shape, tl.float32)
    if FORMAT == "q4_k" or FORMAT == "q5_k":
        scale, low = _six_bits(words, n, inside, sixteen // 2 % 8)
        values = codes.to(tl.float32)
    elif FORMAT == "q2_k":
        scale, low = _nibble_pairs(words, n, inside, sixteen % 16)
        values = codes.to(tl.float32)
    elif FORMAT == "q3_k":
        scale = _signed_six_bits(words, halves, n, inside, sixteen % 16)
        values = (codes - 4).to(tl.float32)
    elif FORMAT == "q6_k":
        scale = _signed_bytes(words, halves, n, inside, sixteen % 16)
        values = (codes - 32).to(tl.float32)
    elif FORMAT == "iq4_xs":
        scale = _split_six_bits(words, n, inside, sixteen // 2 % 8)
        values = _iq4(codes)
    elif FORMAT == "iq4_nl":
        scale = half_to_float(tl.load(halves, mask=inside, other=0))
        values = _iq4(codes)
    elif FORMAT == "q5_0":
        scale = half_to_float(tl.load(halves, mask=inside, other=0))
        values = (codes - 16).to(tl.float32)
    else:  # Q4_1 and Q5_1: a scale, and what the weights of code 0 are.
        both = tl.load(words, mask=inside, other=0)
        scale, low = half_to_float(both), -half_to_float(both >> 16)
        values = codes.to(tl.float32)
    return values, scale, low

// Conversions of e4m3fn, the 8-bit floating point of fp8 weights and of nvfp4's scales: bias 7, no
// infinity, and NaN where all bits but the sign are ones (OCP 8-bit floating point).
#pragma once

#include "lk/kernels/simd.h"

namespace lk::LK_ISA {

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

// The upper and the lower bytes of the bf16 of every magnitude: two registers each, for vpermi2b.
// Shifting the bits into place instead would make subnormal bf16, which vdpbf16ps treats as zeros.
struct E4m3Tables {
  alignas(64) uint8_t high[128];
  alignas(64) uint8_t low[128];
  constexpr E4m3Tables() : high(), low() {
    for (int code = 0; code < 128; ++code) {
      const int exponent = code >> 3;
      const int fraction = code & 7;
      uint32_t bits = 0;
      if (code == 127) {
        bits = 0x7fc0;
      } else if (exponent != 0) {
        bits = static_cast<uint32_t>((exponent + 120) << 7 | fraction << 4);
      } else if (fraction != 0) {  // fraction * 2^-9
        const int leading = fraction >= 4 ? 2 : fraction >= 2 ? 1 : 0;
        bits = static_cast<uint32_t>((leading + 118) << 7 | ((fraction << (7 - leading)) & 127));
      }
      high[code] = static_cast<uint8_t>(bits >> 8);
      low[code] = static_cast<uint8_t>(bits & 255);
    }
  }
};
inline constexpr E4m3Tables kE4m3Tables;

// The lower and the upper bytes of the bf16 of 64 codes.
struct Bf16Bytes {
  __m512i lower;
  __m512i upper;
};
inline Bf16Bytes e4m3_to_bf16_bytes(__m512i codes) {
  const __m512i lower = _mm512_permutex2var_epi8(_mm512_load_si512(kE4m3Tables.low), codes,
                                                 _mm512_load_si512(kE4m3Tables.low + 64));
  const __m512i upper = _mm512_permutex2var_epi8(_mm512_load_si512(kE4m3Tables.high), codes,
                                                 _mm512_load_si512(kE4m3Tables.high + 64));
  const __m512i sign = _mm512_set1_epi8(-128);
  return {lower, _mm512_ternarylogic_epi32(upper, codes, sign, 0xf8)};  // upper | codes & sign
}

#elif defined(__AVX2__) && !defined(__AVX512F__)

// A unit's codes become floats by way of fp16: shifted into place, a code is a half that is too
// small by 2^8, subnormal or not. That takes 24 instructions for 32 weights. In floats, subnormal
// codes must be converted apart, and it took 56.
constexpr float kE4m3Unit = 256;

inline void e4m3_to_floats(U32x16 a, F32x16* w) {
  // Four rows' bytes 0, then their bytes 1, and so on.
  const __m256i by_byte = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i by_row = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const auto halves = [](__m256i shifted) {  // codes in the upper bytes of 16 bits
    const __m256i magnitude = _mm256_set1_epi16(0x7f00);
    const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(shifted, magnitude), magnitude);
    const __m256i half =
        _mm256_and_si256(_mm256_srai_epi16(shifted, 1), _mm256_set1_epi16(-0x4080));
    return _mm256_or_si256(half, nan);
  };
  for (int i = 0; i < kVectors; ++i) {
    const __m256i bytes =
        _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8((__m256i)a.v[i], by_byte), by_row);
    const __m256i even = halves(_mm256_unpacklo_epi8(_mm256_setzero_si256(), bytes));
    const __m256i odd = halves(_mm256_unpackhi_epi8(_mm256_setzero_si256(), bytes));
    w[0].v[i] = _mm256_cvtph_ps(_mm256_castsi256_si128(even));
    w[1].v[i] = _mm256_cvtph_ps(_mm256_castsi256_si128(odd));
    w[2].v[i] = _mm256_cvtph_ps(_mm256_extracti128_si256(even, 1));
    w[3].v[i] = _mm256_cvtph_ps(_mm256_extracti128_si256(odd, 1));
  }
}

#else

// Byte `n` of each lane.
inline F32x16 e4m3_to_float(U32x16 a, int n) {
  F32x16 result;
  const U32x16 bytes = a >> 8 * n;
  for (int i = 0; i < kVectors; ++i) {
    const UintVector magnitude = bytes.v[i] & 0x7f;
    const FloatVector subnormal =
        __builtin_convertvector((IntVector)magnitude, FloatVector) * 0x1p-9f;
    UintVector bits = magnitude < 8 ? (UintVector)subnormal : (magnitude << 20) + (120u << 23);
    bits = magnitude == 0x7f ? UintVector{} + 0x7fc00000u : bits;
    result.v[i] = (FloatVector)(bits | (bytes.v[i] & 0x80) << 24);
  }
  return result;
}
constexpr float kE4m3Unit = 1;

inline void e4m3_to_floats(U32x16 a, F32x16* w) {
  for (int i = 0; i < 4; ++i) w[i] = e4m3_to_float(a, i);
}

#endif

}  // namespace lk::LK_ISA

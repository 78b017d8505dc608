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

#endif

}  // namespace lk::LK_ISA

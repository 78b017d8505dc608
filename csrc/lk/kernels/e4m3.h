// Conversions of e4m3fn, the 8-bit floating point of fp8 weights and of nvfp4's scales: bias 7, no
// infinity, and NaN where all bits but the sign are ones (OCP 8-bit floating point).
#pragma once

#include "lk/kernels/simd.h"

namespace lk::LK_ISA {

#if defined(__AVX512VBMI__)

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

// A unit's codes become floats by shifts: a code whose magnitude ends in bit 20 is a float that is
// too small by 2^120. Subnormal codes become subnormal floats; so the mode of the thread must let
// those count (float_mode.h). Intel's CPUs take some 150 cycles to multiply one, which is rare: one
// of 8000 weights is subnormal where the largest one of a block is 4.5 standard deviations.
inline FloatVector e4m3_to_float(UintVector shifted) {
  return (FloatVector)(shifted & 0x87f00000u) * 0x1p120f;
}

inline void e4m3_to_floats(U32x16 a, F32x16* w) {
  for (int i = 0; i < kVectors; ++i) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    // Two codes of each lane are shifted at once.
    const __m256i odd = _mm256_srai_epi16((__m256i)a.v[i], 4);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)a.v[i], 8), 4);
    w[0].v[i] = e4m3_to_float((UintVector)even << 16);
    w[1].v[i] = e4m3_to_float((UintVector)odd << 16);
    w[2].v[i] = e4m3_to_float((UintVector)even);
    w[3].v[i] = e4m3_to_float((UintVector)odd);
#else
    for (int n = 0; n < 4; ++n) {
      w[n].v[i] = e4m3_to_float((UintVector)((IntVector)(a.v[i] << (24 - 8 * n)) >> 4));
    }
#endif
  }
}

#endif

}  // namespace lk::LK_ISA

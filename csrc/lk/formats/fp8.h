// e4m3fn weights: four along K in a unit. Every value is exact in bf16.
#pragma once

#include "lk/arithmetic.h"

namespace lk::LK_ISA {

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

// The upper or the lower byte of the bf16 of every magnitude, two registers each for vpermi2b.
// A table, since shifting the bits into place would leave subnormals to vdpbf16ps, which takes
// them for zeros.
struct Fp8Tables {
  alignas(64) uint8_t high[128];
  alignas(64) uint8_t low[128];
  constexpr Fp8Tables() : high(), low() {
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
inline constexpr Fp8Tables kFp8Tables;

// The bf16 of 64 codes, their lower and their upper bytes.
struct Fp8Bytes {
  __m512i lower;
  __m512i upper;
};
inline Fp8Bytes fp8_bytes(__m512i codes) {
  const __m512i lower = _mm512_permutex2var_epi8(_mm512_load_si512(kFp8Tables.low), codes,
                                                 _mm512_load_si512(kFp8Tables.low + 64));
  const __m512i upper = _mm512_permutex2var_epi8(_mm512_load_si512(kFp8Tables.high), codes,
                                                 _mm512_load_si512(kFp8Tables.high + 64));
  const __m512i sign = _mm512_set1_epi8(-128);
  return {lower, _mm512_ternarylogic_epi32(upper, codes, sign, 0xf8)};  // upper | codes & sign
}

struct Fp8 {
  using Math = Pairs;
  static constexpr int kUnit = 4;
  // First the pair of bytes 0 and 2, then of 1 and 3: each is where a mask and a shift can put it.
  static constexpr uint8_t kOrder[8] = {0, 2, 1, 3, 4, 6, 5, 7};
  static void unpack(U32x16 bits, Pairs::Weights* w) {
    const auto [lower, upper] = fp8_bytes((__m512i)bits.v[0]);
    // Even bytes: lower | upper << 8. Odd bytes: lower >> 8 | upper & ff00.
    const __m512i even = _mm512_set1_epi16(0x00ff);
    w[0] = (__m512bh)_mm512_ternarylogic_epi32(lower, _mm512_slli_epi16(upper, 8), even, 0xec);
    w[1] = (__m512bh)_mm512_ternarylogic_epi32(_mm512_srli_epi16(lower, 8), upper, even, 0xf4);
  }
};

#else

struct Fp8 {
  using Math = Floats;
  static constexpr int kUnit = 4;
  static constexpr uint8_t kOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  static void unpack(U32x16 bits, F32x16* w) {
    for (int i = 0; i < kUnit; ++i) w[i] = e4m3_to_float(bits, i);
  }
};

#endif

}  // namespace lk::LK_ISA

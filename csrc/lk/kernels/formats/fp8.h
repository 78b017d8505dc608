// fp8 (e4m3fn) weights: four along K in a unit. Every value is exact in bf16.
#pragma once

#include "lk/kernels/arithmetic.h"
#include "lk/kernels/e4m3.h"

namespace lk::LK_ISA {

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)

struct Fp8 {
  using Math = Bf16Pairs;
  static constexpr int kUnitWeights = 4;
  // The pair of bytes 0 and 2 comes first, then the pair of bytes 1 and 3: a mask and a shift put
  // each of them into place.
  static constexpr uint8_t kOrder[8] = {0, 2, 1, 3, 4, 6, 5, 7};
  static void unpack(U32x16 bits, Bf16Pairs::Weights* w) {
    const auto [lower, upper] = e4m3_to_bf16_bytes((__m512i)bits.v[0]);
    // Even bytes: lower | upper << 8. Odd bytes: lower >> 8 | upper & ff00.
    const __m512i even = _mm512_set1_epi16(0x00ff);
    w[0] = (__m512bh)_mm512_ternarylogic_epi32(lower, _mm512_slli_epi16(upper, 8), even, 0xec);
    w[1] = (__m512bh)_mm512_ternarylogic_epi32(_mm512_srli_epi16(lower, 8), upper, even, 0xf4);
  }
};

#else

struct Fp8 {
  using Math = Floats;
  static constexpr int kUnitWeights = 4;
  static constexpr uint8_t kOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  static constexpr float kWeightUnit = kE4m3Unit;
  static void unpack(U32x16 bits, F32x16* w) { e4m3_to_floats(bits, w); }
};

#endif

}  // namespace lk::LK_ISA

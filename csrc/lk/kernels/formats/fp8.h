// fp8 (e4m3fn) weights: four along K in a unit. Every value is exact in bf16. A NaN may be unpacked
// as any number, since its scale is NaN as well (nan_weights.h).
#pragma once

#include "lk/kernels/arithmetic.h"
#include "lk/kernels/e4m3.h"

namespace lk::LK_ISA {

#if defined(__AVX512VBMI__)

// The bf16 of bytes 0 and 2 of each lane, and those of bytes 1 and 3: a mask and a shift put them
// into place.
inline void e4m3_to_bf16_pairs(U32x16 codes, __m512i* pairs) {
  const auto [lower, upper] = e4m3_to_bf16_bytes((__m512i)codes.v[0]);
  // Even bytes: lower | upper << 8. Odd bytes: lower >> 8 | upper & ff00.
  const __m512i even = _mm512_set1_epi16(0x00ff);
  pairs[0] = _mm512_ternarylogic_epi32(lower, _mm512_slli_epi16(upper, 8), even, 0xec);
  pairs[1] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(lower, 8), upper, even, 0xf4);
}

#endif
#if defined(__AVX512VBMI__) && defined(__AVX512BF16__)

struct Fp8 {
  using Math = Bf16Pairs;
  static constexpr int kUnitWeights = 4;
  static constexpr uint8_t kOrder[8] = {0, 2, 1, 3, 4, 6, 5, 7};
  static void unpack(U32x16 bits, Bf16Pairs::Weights* w) {
    e4m3_to_bf16_pairs(bits, reinterpret_cast<__m512i*>(w));
  }
};

#elif defined(__AVX512VBMI__)

struct Fp8 {
  using Math = Floats;
  static constexpr int kUnitWeights = 4;
  static constexpr uint8_t kOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  static void unpack(U32x16 bits, F32x16* w) {
    __m512i pairs[2];
    e4m3_to_bf16_pairs(bits, pairs);
    for (int i = 0; i < 2; ++i) {
      const U32x16 pair{(UintVector)pairs[i]};
      w[i] = as_float(pair << 16);
      w[i + 2] = as_float(pair & 0xffff0000);
    }
  }
};

#else

struct Fp8 {
  using Math = Floats;
  static constexpr int kUnitWeights = 4;
  static constexpr uint8_t kOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  static constexpr bool kSlowUnpack = true;
  static void unpack(U32x16 bits, F32x16* w) { e4m3_to_floats(bits, w); }
};

#endif

}  // namespace lk::LK_ISA

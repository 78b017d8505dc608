// 4-bit weights as floats or bf16: eight along K in a unit, each a code for one of 16 values.
// Values is a type with those values in two tables, kFloat and, for CPUs that multiply bf16, kBf16.
#pragma once

#include "lk/kernels/arithmetic.h"

namespace lk::LK_ISA {

template <class Values>
struct Nibbles {
  static constexpr int kUnitWeights = 8;
#if defined(__AVX512BF16__)
  using Math = Bf16Pairs;
  // vpermw reads only the low five bits of each 16-bit word, so a shift is enough to bring a nibble
  // into place, and a table that is repeated makes the fifth bit harmless: seven instructions for
  // 128 weights. Pair i is nibble i of both words of the unit.
  static constexpr uint8_t kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  static void unpack(U32x16 bits, Bf16Pairs::Weights* w) {
    const __m512i table =
        _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(Values::kBf16)));
    const auto codes = (__m512i)bits.v[0];
    w[0] = (__m512bh)_mm512_permutexvar_epi16(codes, table);
    w[1] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
    w[2] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
    w[3] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table);
  }
#else
  using Math = Floats;
  static constexpr uint8_t kOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  static void unpack(U32x16 bits, F32x16* w) {
    for (int i = 0; i < kUnitWeights; ++i) w[i] = lookup(Values::kFloat, bits >> 4 * i);
  }
#endif
};

}  // namespace lk::LK_ISA

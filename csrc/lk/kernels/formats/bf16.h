// bf16 weights: two along K in a unit.
#pragma once

#include "lk/kernels/arithmetic.h"

namespace lk::LK_ISA {

struct Bf16 {
  static constexpr bool kNoGroupScales = true;
  static constexpr int kUnitWeights = 2;
#if defined(__AVX512BF16__)
  using Math = Bf16Pairs;
  static constexpr bool kStoredAsMultiplied = true;
  static constexpr uint8_t kOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  static void unpack(U32x16 bits, Bf16Pairs::Weights* w) { w[0] = (__m512bh)bits.v[0]; }
#else
  using Math = Floats;
#if defined(__AVX2__) && !defined(__AVX512F__)
  static constexpr bool kQuickUnpack = true;
#endif
  static constexpr uint8_t kOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  static void unpack(U32x16 bits, F32x16* w) {
    w[0] = as_float(bits << 16);
    w[1] = as_float(bits & 0xffff0000);
  }
#endif
};

}  // namespace lk::LK_ISA

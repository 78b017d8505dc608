// fp16 weights: two along K in a unit, converted to float. CPUs before AVX512-FP16 cannot multiply
// halves, and AVX512-FP16 would also add them in half precision.
#pragma once

#include "lk/kernels/arithmetic.h"

namespace lk::LK_ISA {

struct Fp16 {
  static constexpr bool kNoGroupScales = true;
#if !defined(__AVX512F__)
  static constexpr bool kSlowUnpack = true;
#endif
  using Math = Floats;
  static constexpr int kUnitWeights = 2;
  static constexpr uint8_t kOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  static void unpack(U32x16 bits, F32x16* w) {
    w[0] = half_to_float(bits, 0);
    w[1] = half_to_float(bits, 1);
  }
};

}  // namespace lk::LK_ISA

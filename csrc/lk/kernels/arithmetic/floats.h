// Arithmetic on floats, for every CPU.
#pragma once

#include "lk/kernels/arithmetic/activations.h"

namespace lk::LK_ISA {

// What arithmetics with float sums have in common: sums begin at zero and need no scale, so a
// packed row holds nothing but activations.
template <int kBytes>
struct FloatSums {
  using Sum = F32x16;
  static constexpr int kActBytes = kBytes;
  static constexpr bool kQuantised = false;

  static Sum begin(const char*) { return zeros(); }
  static Sum copy(Sum start) { return start; }
  static float scale(const char*) { return 1.0f; }
  static F32x16 value(Sum sum, float) { return sum; }
  static F32x16 add(Sum sum, float, F32x16 to) { return sum + to; }
  static int64_t block_info_offset(int64_t, int64_t) { return 0; }
  static int64_t row_bytes(int64_t k) { return act_blocks(k) * kActBlock * kActBytes; }
};

// Whether F::unpack gives weights in the order of K.
template <class F>
constexpr bool in_order() {
  for (int i = 0; i < 8; ++i) {
    if (F::kOrder[i] != i) return false;
  }
  return true;
}

struct Floats : FloatSums<4> {
  using Products = Floats;
  using Weights = F32x16;
  using Act = F32x16;
  static constexpr const char* kName = "float";
  static constexpr int kStepWeights = 1;

  static Act act(const char* p) { return broadcast(*reinterpret_cast<const float*>(p)); }
  static Sum multiply_add(Sum sum, Weights w, Act a) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    for (int i = 0; i < kVectors; ++i) sum.v[i] = add_product(sum.v[i], w.v[i], a.v[i]);
    return sum;
#else
    return fma(w, a, sum);
#endif
  }
  static Sum multiply_add(Sum sum, Weights w, const char* p) {
#if defined(__AVX512F__)
    return {add_product(sum.v[0], w.v[0], p)};
#else
    return multiply_add(sum, w, act(p));
#endif
  }
  // Packs a block of activations, in their own order. Returns their sum.
  template <class F>
  static float pack(const float* values, char* row, int64_t block, int, int64_t) {
    static_assert(in_order<F>(), "activations are not reordered");
    auto* to = reinterpret_cast<float*>(row + block * kActBlock * kActBytes);
    float sum = 0;
    for (int i = 0; i < kActBlock; ++i) {
      to[i] = values[i] * weight_unit<F>();
      sum += values[i];
    }
    return sum;
  }
};

}  // namespace lk::LK_ISA

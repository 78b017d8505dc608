// bf16 weights: how K-contiguous rows become a dot product.
#pragma once

#include "lk/formats/widened.h"

namespace lk::LK_ISA {

#if defined(__AVX512BF16__)

// vdpbf16ps multiplies pairs of bf16 and adds them to 16 floats: activations are bf16 too.
struct Bf16 {
  using Act = uint16_t;
  using Weights = __m512bh;
  static constexpr int kStep = 32;   // weights in one load
  static constexpr int kBytes = 64;  // that they take
  static constexpr int kChains = 1;

  static Act to_act(float value) { return float_to_bf16(value); }
  static Weights load(const char* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Weights load_tail(const char* p, int n) {
    return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
  }
  static F32x16 fma(F32x16 acc, Weights w, const Act* act) {
    return {_mm512_dpbf16_ps(acc.v, w, (__m512bh)_mm512_loadu_si512(act))};
  }
};

#else

using Bf16 = Widened<load_bf16>;

#endif

}  // namespace lk::LK_ISA

// fp16 weights: widened to float. No CPU before AVX512-FP16 multiplies halves, and that one would
// add them in half precision.
#pragma once

#include "lk/simd.h"

namespace lk::LK_ISA {

struct Fp16 {
  using Act = float;  // so that only the weights need widening, and bf16 activations fit as well
  using Weights = F32x16;
  static constexpr int kStep = 16;
  static constexpr int kBytes = 32;
  static constexpr int kChains = kFloatChains;

  static Act to_act(float value) { return value; }
  static Weights load(const char* p) { return load_fp16(reinterpret_cast<const uint16_t*>(p)); }
  static Weights load_tail(const char* p, int n) {
    uint16_t rest[kStep] = {};
    std::memcpy(rest, p, n * sizeof(uint16_t));
    return load_fp16(rest);
  }
  static F32x16 fma(F32x16 acc, Weights w, const Act* act) {
    return LK_ISA::fma(w, LK_ISA::load(act), acc);
  }
};

}  // namespace lk::LK_ISA

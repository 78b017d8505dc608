// 16-bit weights widened to float, for what the CPU cannot multiply as it is.
#pragma once

#include "lk/simd.h"

namespace lk::LK_ISA {

// kLoad widens 16 weights.
template <F32x16 (*kLoad)(const uint16_t*)>
struct Widened {
  using Act = float;  // so that only the weights need widening, and any activations fit
  using Weights = F32x16;
  static constexpr int kStep = 16;   // weights in one load
  static constexpr int kBytes = 32;  // that they take
  static constexpr int kChains = kFloatChains;

  static Act to_act(float value) { return value; }
  static Weights load(const char* p) { return kLoad(reinterpret_cast<const uint16_t*>(p)); }
  static Weights load_tail(const char* p, int n) {
    uint16_t rest[kStep] = {};
    std::memcpy(rest, p, n * sizeof(uint16_t));
    return kLoad(rest);
  }
  static F32x16 fma(F32x16 acc, Weights w, const Act* act) {
    return LK_ISA::fma(w, LK_ISA::load(act), acc);
  }
};

}  // namespace lk::LK_ISA

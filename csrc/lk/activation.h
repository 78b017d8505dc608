// Gated activations, as plain loops that the compiler vectorises for the set instructions.
#pragma once

#include "lk/kernels.h"
#include "lk/simd.h"

namespace lk::LK_ISA {

// e^x with a relative error below 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2]. Inputs are cut
// to where the result is a normal float.
inline float exp_fast(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // ln 2 in two parts, so that n * ln2 loses nothing.
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  // Taylor's terms are enough here: |r| <= 0.347, the first one left out is r^8/40320 < 6e-9.
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

inline float silu(float x) { return x / (1.0f + exp_fast(-x)); }

// erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
inline float gelu(float x) {
  const float z = x * 0.70710678f;
  const float a = z < 0.0f ? -z : z;
  const float t = 1.0f / (1.0f + 0.3275911f * a);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = p * t * exp_fast(-a * a);  // 1 - erf(a)
  return 0.5f * x * (z < 0.0f ? tail : 2.0f - tail);
}

// x * (1 + tanh(u)) / 2 is x / (1 + e^(-2u)).
inline float gelu_tanh(float x) {
  const float u = 0.79788456f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exp_fast(-2.0f * u));
}

template <class F, float (*kFunction)(float)>
void activate_with(const float* gate, const float* up, int64_t n, void* out) {
  auto* act = static_cast<typename F::Act*>(out);
  for (int64_t i = 0; i < n; ++i) act[i] = F::to_act(kFunction(gate[i]) * up[i]);
}

template <class F>
void activate(Activation activation, const float* gate, const float* up, int64_t n, void* act) {
  switch (activation) {
    case Activation::kSilu:
      return activate_with<F, silu>(gate, up, n, act);
    case Activation::kGelu:
      return activate_with<F, gelu>(gate, up, n, act);
    case Activation::kGeluTanh:
      return activate_with<F, gelu_tanh>(gate, up, n, act);
  }
}

}  // namespace lk::LK_ISA

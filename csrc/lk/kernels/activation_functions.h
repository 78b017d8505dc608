// Activation functions (SiLU and its like), 16 values at a time.
#pragma once

#include "lk/kernels.h"
#include "lk/kernels/row_operations.h"
#include "lk/kernels/simd.h"

namespace lk::LK_ISA {

// e^x with a relative error below 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2]. Inputs are
// limited to the range in which the result is a normal float.
inline F32x16 exp_fast(F32x16 x) {
  x = min(max(x, -87.0f), 88.0f);
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const F32x16 shifted = fma(x, broadcast(1.44269504f), broadcast(12582912.0f));
  const F32x16 n = shifted - 12582912.0f;
  // ln 2 comes in two parts, so that n * ln2 is not rounded.
  F32x16 r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  // Taylor's series up to r^7 is enough: |r| <= 0.347, and the first term left out is
  // r^8/40320 < 6e-9.
  F32x16 p = broadcast(1.0f / 5040);
  p = fma(p, r, broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return scale_exponent(p, shifted);
}

inline F32x16 silu(F32x16 x) { return x / (exp_fast(x * -1.0f) + 1.0f); }

// x * (1 + erf(x / sqrt(2))) / 2, with erf by Abramowitz and Stegun 7.1.26, whose absolute error is
// below 1.5e-7.
inline F32x16 gelu(F32x16 x) {
  const F32x16 z = x * 0.70710678f;
  const F32x16 a = select_negative(z, z * -1.0f, z);
  const F32x16 t = broadcast(1.0f) / fma(a, broadcast(0.3275911f), broadcast(1.0f));
  F32x16 p = broadcast(1.061405429f);
  p = fma(p, t, broadcast(-1.453152027f));
  p = fma(p, t, broadcast(1.421413741f));
  p = fma(p, t, broadcast(-0.284496736f));
  p = fma(p, t, broadcast(0.254829592f));
  const F32x16 complement = p * t * exp_fast(a * a * -1.0f);  // 1 - erf(a)
  return x * 0.5f * select_negative(z, complement, broadcast(2.0f) - complement);
}

// x * (1 + tanh(u)) / 2, which is x / (1 + e^(-2u)).
inline F32x16 gelu_tanh(F32x16 x) {
  const F32x16 u = fma(x * x * x, broadcast(0.044715f), x) * 0.79788456f;
  return x / (exp_fast(u * -2.0f) + 1.0f);
}

template <Activation kKind>
F32x16 activate(const ActivationSpec& spec, F32x16 gate, F32x16 up) {
  if constexpr (kKind == Activation::kSilu) return silu(gate) * up;
  if constexpr (kKind == Activation::kGelu) return gelu(gate) * up;
  if constexpr (kKind == Activation::kGeluTanh) return gelu_tanh(gate) * up;
  if constexpr (kKind == Activation::kSwigluOai) {
    // OpenAI's gpt-oss: gate and up are limited, and the result is
    // (up + 1) * gate * sigmoid(alpha * gate). DeepSeek-V4 has alpha 1 and up + 0.
    gate = min(gate, spec.limit);
    up = max(min(up, spec.limit), -spec.limit);
    return (up + spec.beta) * gate / (exp_fast(gate * -spec.alpha) + 1.0f);
  }
  if constexpr (kKind == Activation::kSwigluStep) {
    // Step-3.5 limits the gate after its activation.
    up = max(min(up, spec.limit), -spec.limit);
    return min(silu(gate), spec.limit) * up;
  }
  if constexpr (kKind == Activation::kRelu2) {
    up = max(up, 0.0f);
    return up * up;
  }
}

template <Activation kKind>
void activate_rows(const ActivationSpec& spec, const Sums& gate, const Sums& up, int64_t n,
                   float* out) {
  constexpr bool kGate = has_gate(kKind);  // a constant: has_gate is outside of LK_ISA
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t lanes = n - i < kLanes ? n - i : kLanes;
    const F32x16 u = finished(up.epilogue, up.values, i, lanes);
    const F32x16 g = kGate ? finished(gate.epilogue, gate.values, i, lanes) : u;
    store_some(out + i, activate<kKind>(spec, g, u), lanes);
  }
}

inline void activate(const ActivationSpec& spec, const Sums& gate, const Sums& up, int64_t n,
                     float* out) {
  switch (spec.kind) {
    case Activation::kSilu:
      return activate_rows<Activation::kSilu>(spec, gate, up, n, out);
    case Activation::kGelu:
      return activate_rows<Activation::kGelu>(spec, gate, up, n, out);
    case Activation::kGeluTanh:
      return activate_rows<Activation::kGeluTanh>(spec, gate, up, n, out);
    case Activation::kSwigluOai:
      return activate_rows<Activation::kSwigluOai>(spec, gate, up, n, out);
    case Activation::kSwigluStep:
      return activate_rows<Activation::kSwigluStep>(spec, gate, up, n, out);
    case Activation::kRelu2:
      return activate_rows<Activation::kRelu2>(spec, gate, up, n, out);
  }
}

}  // namespace lk::LK_ISA

// How fast an arithmetic multiplies where memory does not limit it.
#pragma once

#include "lk/kernels/amx_tokens.h"
#include "lk/kernels/arithmetic.h"

namespace lk::LK_ISA {

// Twelve vectors of sums hide the latency of every product: at most six cycles, and two a cycle.
template <class Math>
int64_t multiply_vectors() {
  constexpr int kSums = 12 / (kVectors < 4 ? kVectors : 4);
  constexpr int64_t kTurns = 2000;
  alignas(64) char memory[sizeof(typename Math::Weights)] = {};
  typename Math::Sum sum[kSums] = {};
  for (int64_t turn = 0; turn < kTurns; ++turn) {
    // For all the compiler knows, the memory changes and no two activations are the same, so that
    // it multiplies for each sum in each turn.
    asm volatile("" : : "r"(memory) : "memory");
    const auto weights = *reinterpret_cast<const typename Math::Weights*>(memory);
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) {
      sum[i] = Math::multiply_add(sum[i], weights, Math::act(memory + 4 * i));
    }
  }
  typename Math::Sum result[kSums];  // Only these have an address, so sums stay in registers.
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) result[i] = sum[i];
  asm volatile("" : : "r"(result) : "memory");  // somebody might read them
  return kTurns * kSums * kLanes * Math::kStepWeights;
}

#if defined(__AMX_TILE__)

// The registers that configure_tiles has set up hold zeros.
template <class Math>
int64_t multiply_tiles() {
  constexpr int64_t kTurns = 300;
  configure_tiles(kAmxTokens, kAmxSteps);
  for (int64_t turn = 0; turn < kTurns; ++turn) {
    Math::template multiply_tiles<amx_sum(0, 0), amx_acts(0), amx_weights(0)>();
    Math::template multiply_tiles<amx_sum(0, 1), amx_acts(0), amx_weights(1)>();
    Math::template multiply_tiles<amx_sum(1, 0), amx_acts(1), amx_weights(0)>();
    Math::template multiply_tiles<amx_sum(1, 1), amx_acts(1), amx_weights(1)>();
  }
  release_tiles();
  return kTurns * 4 * kAmxTokens * kAmxSteps * kLanes * Math::kStepWeights;
}

#endif

// FormatKernels::multiply_in_registers. It takes some 10 us.
template <class Math>
int64_t multiply_in_registers() {
#if defined(__AMX_TILE__)
  if constexpr (requires { Math::kTiles; }) return multiply_tiles<Math>();
#endif
  return multiply_vectors<Math>();
}

}  // namespace lk::LK_ISA

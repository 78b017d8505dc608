// Rows of activations in the form that the matmul reads.
//
// A packed row holds its blocks of activations, then what the arithmetic keeps for each block, and
// for formats with zero points the float sum of each block.
#pragma once

#include "lk/kernels/arithmetic.h"
#include "lk/kernels/format_traits.h"

namespace lk::LK_ISA {

// Bytes of a packed row of k activations, whole cache lines.
template <class F>
int64_t act_row_bytes(int64_t k) {
  const int64_t bytes = F::Math::row_bytes(k);
  const int64_t most_blocks = act_blocks(k) * (kActBlock >> kLeastActBlockLog2);
  return (bytes + (kZeroPoints<F> ? most_blocks * 4 : 0) + 63) / 64 * 64;
}

// The sums of the blocks of a packed row.
template <class F>
const float* act_sums(const char* row, int64_t k) {
  return reinterpret_cast<const float*>(row + F::Math::row_bytes(k));
}

// The blocks of activations that have a sum each. Where activations are floats, nothing else is
// kept of a block, and groups of weights may be shorter than the blocks that are packed at a time.
template <class F>
constexpr bool kFineSums = kOwnScales<F> && !kQuantisedActs<F>;
template <class F>
int sum_block_log2(int act_block_log2) {
  if (kFineSums<F>) return kLeastActBlockLog2;
  return kQuantisedActs<F> ? act_block_log2 : kActBlockLog2;
}

// FormatKernels::pack.
template <class F>
void pack(const float* values, int64_t n, int64_t at, int64_t k, int block_log2, void* out) {
  auto* row = static_cast<char*>(out);
  const int log2 = kQuantisedActs<F> ? block_log2 : kActBlockLog2;
  const int64_t size = int64_t{1} << log2;
  for (int64_t i = 0; i < n; i += size) {
    const float* from = values + i;
    float padded[int64_t{1} << kMostActBlockLog2] = {};
    if (n - i < size) {
      std::memcpy(padded, from, (n - i) * sizeof(float));
      from = padded;
    }
    const int64_t block = (at + i) >> log2;
    const float sum = F::Math::template pack<F>(from, row, block, log2, k);
    if constexpr (kZeroPoints<F> && kFineSums<F>) {
      auto* sums = const_cast<float*>(act_sums<F>(row, k)) + ((at + i) >> kLeastActBlockLog2);
      for (int64_t j = 0; j < size; j += int64_t{1} << kLeastActBlockLog2, ++sums) {
        *sums = 0;
        for (int64_t n = j; n < j + (int64_t{1} << kLeastActBlockLog2); ++n) *sums += from[n];
      }
    } else if constexpr (kZeroPoints<F>) {
      const_cast<float*>(act_sums<F>(row, k))[block] = sum;
    }
  }
}

// The sum of a token's activations over [begin, end) of K.
template <class F>
float act_sum(const char* row, int64_t begin, int64_t end, int64_t k, int block_log2) {
  const int log2 = sum_block_log2<F>(block_log2);
  const float* sums = act_sums<F>(row, k);
  float total = 0;
  for (int64_t b = begin >> log2; b << log2 < end; ++b) total += sums[b];
  return total;
}

}  // namespace lk::LK_ISA

// How rows of activations are packed: their blocks, the order within them, and their rounding to
// integers.
#pragma once

#include "lk/kernels.h"
#include "lk/kernels/instructions.h"

namespace lk::LK_ISA {

// A packed row is padded with zeros to whole blocks of this size, in every arithmetic.
constexpr int64_t act_blocks(int64_t k) { return (k + kActBlock - 1) / kActBlock; }

// The weight that 1 stands for, once unpacked. Packed activations or their scales are multiplied by
// it.
template <class F>
constexpr float weight_unit() {
  if constexpr (requires { F::kWeightUnit; }) {
    return F::kWeightUnit;
  } else {
    return 1;
  }
}

#if defined(__AVX2__)

// The order of packed activations is that of unpacked weights, which is F::kOrder in each eight.
// These are the indices of a shuffle of 16 bytes, for activations of kBytes each.
template <class F, int kBytes>
struct PackOrder {
  alignas(16) uint8_t index[16];
  constexpr PackOrder() : index() {
    for (int i = 0; i < 16; ++i) {
      const int value = i / kBytes;
      index[i] = static_cast<uint8_t>((value / 8 * 8 + F::kOrder[value % 8]) * kBytes + i % kBytes);
    }
  }
  __m128i vector() const { return _mm_load_si128(reinterpret_cast<const __m128i*>(index)); }
};
template <class F, int kBytes>
inline constexpr PackOrder<F, kBytes> kPackOrder;

// What arithmetics on integers have in common: each block of activations is divided by a scale and
// rounded, and the sum over a block is scaled. A packed row holds a BlockInfo for each block,
// behind all activations, and has room for those of the smallest blocks.
template <int kBytes>
struct QuantisedActs {
  static constexpr int kActBytes = kBytes;
  static constexpr bool kQuantised = true;

  struct BlockInfo {
    float scale;
    int32_t begin;  // the bits that each lane's sum over the block begins with
  };
  static const BlockInfo& info_at(const char* p) { return *reinterpret_cast<const BlockInfo*>(p); }
  static float scale(const char* info) { return info_at(info).scale; }
  // The sums that a block begins with, and a copy in registers of its own.
  static I32x16 begin(const char* info) {
    I32x16 sum;
    for (auto& v : sum.v) v = IntVector{} + info_at(info).begin;
    return sum;
  }
  static I32x16 copy(I32x16 start) {
    for (auto& v : start.v) v = opaque(v);
    return start;
  }
  static int64_t block_info_offset(int64_t k, int64_t block) {
    return act_blocks(k) * kActBlock * kBytes + block * static_cast<int64_t>(sizeof(BlockInfo));
  }
  static int64_t row_bytes(int64_t k) {
    return block_info_offset(k, act_blocks(k) * (kActBlock >> kLeastActBlockLog2));
  }
  static F32x16 value(I32x16 sum, float scale) { return to_float(sum) * scale; }
  static F32x16 add(I32x16 sum, float scale, F32x16 to) {
    return fma(to_float(sum), broadcast(scale), to);
  }
};

// The number of activations in a block of a row of k, with its padding.
inline int64_t act_block_size(int64_t block, int block_log2, int64_t k) {
  const int64_t left = act_blocks(k) * kActBlock - (block << block_log2);
  return min(left, int64_t{1} << block_log2);
}

// The largest magnitude of n values. Compared as integers, magnitudes have the same order as
// floats, and infinity and NaN are larger than all numbers. So a block with one of them gets it as
// its scale, and none of its sums looks finite.
inline float largest_magnitude(const float* values, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = bits_of(values[i]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return float_of(largest);
}

// 16 values times `factor`, rounded to nearest even, in 16 bits.
inline __m256i rounded(const float* values, float factor) {
#if defined(__AVX512F__)
  const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(factor));
  return _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(scaled));
#else
  const __m256 by = _mm256_set1_ps(factor);
  const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values), by));
  const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + 8), by));
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
#endif
}

// 16 integers of 16 bits in 8 bits.
inline __m128i narrowed(__m256i values) {
  return _mm_packs_epi16(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
}

inline int32_t sum_of_lanes(__m128i four) {
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

#endif

}  // namespace lk::LK_ISA

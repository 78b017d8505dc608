// Arithmetic on pairs of 16-bit integers: vpmaddwd multiplies them and adds both products, exactly.
//
// Weights are integers of at most 8 bits. Activations have a scale for each block and 16 bits: the
// error of an activation is at most 2^-16 of the largest in its block, far less than x has from
// being bf16. An instruction multiplies twice as many weights as one on floats. The sum of 128
// products of 8 and 16 bits stays below 2^30.
//
// Weights may be higher by kOffset than what they stand for. The sum over a block begins with
// -kOffset times the sum of its activations. Int16Products is what does not depend on kOffset.
#pragma once

#include "lk/kernels/arithmetic/activations.h"

#if defined(__AVX2__)

namespace lk::LK_ISA {

struct Int16Products : QuantisedActs<2> {
  using Weights = I32x16;
  using Sum = I32x16;
  using Act = IntVector;
  static constexpr const char* kName = "int16";
  static constexpr int kStepWeights = 2;
  static constexpr int kMostBlockLog2 = 7;  // as long as the blocks of many_tokens.h
  static constexpr int kOutlierBlockLog2 = 6;

  static Act act(const char* p) { return broadcast_bits(p); }
  static Sum multiply_add(Sum sum, Weights w, Act a) {
#if defined(LK_VPDPBUSD)
    for (int i = 0; i < kVectors; ++i) sum.v[i] = add_short_products(sum.v[i], w.v[i], a);
#elif defined(__AVX512F__)
    sum.v[0] = opaque(sum.v[0] + (IntVector)_mm512_madd_epi16((__m512i)w.v[0], (__m512i)a));
#else
    for (int i = 0; i < kVectors; ++i) {
      sum.v[i] = opaque(sum.v[i] + (IntVector)_mm256_madd_epi16((__m256i)w.v[i], (__m256i)a));
    }
#endif
    return sum;
  }
  static Sum multiply_add(Sum sum, Weights w, const char* p) {
#if defined(__AVX512VNNI__)
    return {add_short_products(sum.v[0], w.v[0], p)};
#else
    return multiply_add(sum, w, act(p));
#endif
  }
};

template <int kOffset>
struct Int16Pairs : Int16Products {
  using Products = Int16Products;

  // Packs a block of activations. Returns their sum, as they were rounded.
  template <class F>
  static float pack(const float* values, char* row, int64_t block, int block_log2, int64_t k) {
    const int64_t size = act_block_size(block, block_log2, k);
    const float top = largest_magnitude(values, size);
    const float inverse = top > 0 ? 32767.0f / top : 0.0f;
    const __m256i order = _mm256_broadcastsi128_si256(kPackOrder<F, 2>.vector());
    char* to = row + (block << block_log2) * kActBytes;
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < size; i += 16) {
      const __m256i sixteen = rounded(values + i, inverse);
      total = _mm256_add_epi32(total, _mm256_madd_epi16(sixteen, _mm256_set1_epi16(1)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * kActBytes),
                          _mm256_shuffle_epi8(sixteen, order));
    }
    const int32_t sum = sum_of_lanes(
        _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1)));
    const float scale = top / 32767.0f;
    const BlockInfo info{scale * weight_unit<F>(), -kOffset * sum};
    std::memcpy(row + block_info_offset(k, block), &info, sizeof(info));
    return scale * static_cast<float>(sum);
  }
};

}  // namespace lk::LK_ISA

#endif

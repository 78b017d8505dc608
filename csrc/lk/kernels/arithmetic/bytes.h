// Arithmetic on four bytes: unsigned weights times signed activations, summed as integers.
//
// Weights are made unsigned by adding kOffset. The sum over a block begins with -kOffset times the
// sum of its activations, so that it ends as that of the signed weights. ByteProducts is what does
// not depend on kOffset.
#pragma once

#include "lk/kernels/arithmetic/activations.h"

#if defined(__AVX2__)

namespace lk::LK_ISA {

// Rounds a block of activations to 8 bits and packs it. Calls each(bytes) with the packed
// activations, 16 at a time. Returns the scale.
template <class F, class Each>
float pack_bytes(const float* values, int64_t size, char* to, Each&& each) {
  const float top = largest_magnitude(values, size);
  const float inverse = top > 0 ? 127.0f / top : 0.0f;
  for (int64_t i = 0; i < size; i += 16) {
    const __m128i bytes =
        _mm_shuffle_epi8(narrowed(rounded(values + i, inverse)), kPackOrder<F, 1>.vector());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), bytes);
    each(bytes);
  }
  return top / 127.0f;
}

// Four products are added to an int32: by vpdpbusd, or by three instructions (instructions.h).
struct ByteProducts : QuantisedActs<1> {
  using Weights = I32x16;
  using Sum = I32x16;
  using Act = IntVector;
#if defined(__AMX_TILE__)
  static constexpr const char* kName = "int8 tiles";
#else
  static constexpr const char* kName = "int8";
#endif
  static constexpr int kStepWeights = 4;

  static Act act(const char* p) { return broadcast_bits(p); }
  static Sum multiply_add(Sum sum, Weights w, Act a) {
    for (int i = 0; i < kVectors; ++i) sum.v[i] = add_byte_products(sum.v[i], w.v[i], a);
    return sum;
  }
  static Sum multiply_add(Sum sum, Weights w, const char* p) {
#if defined(__AVX512VNNI__)
    return {add_byte_products(sum.v[0], w.v[0], p)};
#else
    return multiply_add(sum, w, act(p));
#endif
  }
#if defined(__AMX_TILE__)
  static constexpr bool kTiles = true;
  template <int kC, int kA, int kB>
  static void multiply_tiles() {
    add_byte_tiles<kC, kA, kB>();
  }
  static Sum from_tile(const char* p) { return {*reinterpret_cast<const IntVector*>(p)}; }
#endif
};

template <int kOffset>
struct Bytes : ByteProducts {
  using Products = ByteProducts;
  static constexpr int kMostBlockLog2 = kMostActBlockLog2;
  static constexpr int kOutlierBlockLog2 = 5;

#if defined(__AMX_TILE__)
  // Tiles hold signed weights, so that their sums need no correction.
  static Weights for_tiles(Weights w) {
    typedef uint8_t ByteVector __attribute__((vector_size(kVectorBytes)));
    return {(IntVector)((ByteVector)w.v[0] - static_cast<uint8_t>(kOffset))};
  }
#endif
  // Packs a block of activations. Returns their sum, as they were rounded.
  template <class F>
  static float pack(const float* values, char* row, int64_t block, int block_log2, int64_t k) {
    const int64_t size = act_block_size(block, block_log2, k);
    __m128i total = _mm_setzero_si128();
    const float scale = pack_bytes<F>(
        values, size, row + (block << block_log2),
        [&](__m128i bytes) { total = add_byte_products(total, _mm_set1_epi8(1), bytes); });
    const int32_t sum = sum_of_lanes(total);
    const BlockInfo info{scale * weight_unit<F>(), -kOffset * sum};
    std::memcpy(row + block_info_offset(k, block), &info, sizeof(info));
    return scale * static_cast<float>(sum);
  }
};

#if !defined(LK_VPDPBUSD)

// vpmaddubsw multiplies bytes and adds two products, in 16 bits. Those of weights of few bits fit,
// and so does their sum over a block, since it begins with what makes it one of signed weights:
// 32 products of int4 are at most 32 * 8 * 127 = 32512, 16 of e2m1 or of 5 bits are at most
// 16 * 16 * 127, which is the same, and so are 8 of 6 bits. It does not matter that the sum may
// wrap around before its end. So a step takes two instructions.
struct ShortByteProducts : QuantisedActs<1> {
  using Weights = I32x16;
  using Sum = I32x16;  // two sums of 16 bits in each lane
  using Act = IntVector;
  static constexpr const char* kName = "int8";
  static constexpr int kStepWeights = 4;

  static Sum begin(const char* info) {
    Sum sum;
    for (auto& v : sum.v) v = broadcast_bits(reinterpret_cast<const char*>(&info_at(info).begin));
    return sum;
  }
  static Sum copy(Sum start) { return start; }
  static Act act(const char* p) { return broadcast_bits(p); }
  static Sum multiply_add(Sum sum, Weights w, Act a) {
    for (int i = 0; i < kVectors; ++i) {
#if defined(__AVX512F__)
      const __m512i products = _mm512_maddubs_epi16((__m512i)w.v[i], (__m512i)a);
      sum.v[i] = opaque((IntVector)_mm512_add_epi16((__m512i)sum.v[i], products));
#else
      const __m256i products = _mm256_maddubs_epi16((__m256i)w.v[i], (__m256i)a);
      sum.v[i] = opaque((IntVector)_mm256_add_epi16((__m256i)sum.v[i], products));
#endif
    }
    return sum;
  }
  static Sum multiply_add(Sum sum, Weights w, const char* p) {
    return multiply_add(sum, w, act(p));
  }
  static F32x16 value(Sum sum, float scale) { return QuantisedActs<1>::value(added(sum), scale); }
  static F32x16 add(Sum sum, float scale, F32x16 to) {
    return QuantisedActs<1>::add(added(sum), scale, to);
  }

 private:
  // Both sums of each lane, added.
  static I32x16 added(Sum sum) {
    for (auto& v : sum.v) {
#if defined(__AVX512F__)
      v = (IntVector)_mm512_madd_epi16((__m512i)v, _mm512_set1_epi16(1));
#else
      v = (IntVector)_mm256_madd_epi16((__m256i)v, _mm256_set1_epi16(1));
#endif
    }
    return sum;
  }
};

template <int kOffset>
  requires(kOffset <= 32)
struct Bytes<kOffset> : ShortByteProducts {
  using Products = ShortByteProducts;
  static constexpr int kMostBlockLog2 = kOffset <= 8 ? 6 : kOffset <= 16 ? 5 : 4;
  static constexpr int kOutlierBlockLog2 = 5;

  // Packs a block of activations. Returns their sum, as they were rounded.
  template <class F>
  static float pack(const float* values, char* row, int64_t block, int block_log2, int64_t k) {
    const int64_t size = act_block_size(block, block_log2, k);
    __m128i pairs = _mm_setzero_si128();  // sums of the activations that share 16 bits of a sum
    const float scale =
        pack_bytes<F>(values, size, row + (block << block_log2), [&](__m128i bytes) {
          pairs = _mm_add_epi16(pairs, _mm_maddubs_epi16(_mm_set1_epi8(1), bytes));
        });
    pairs = _mm_add_epi16(pairs, _mm_shuffle_epi32(pairs, 0x4e));
    pairs = _mm_add_epi16(pairs, _mm_shuffle_epi32(pairs, 0xb1));
    const int32_t begin = _mm_cvtsi128_si32(_mm_mullo_epi16(pairs, _mm_set1_epi16(-kOffset)));
    const int32_t sum = _mm_cvtsi128_si32(_mm_madd_epi16(pairs, _mm_set1_epi16(1)));
    const BlockInfo info{scale * weight_unit<F>(), begin};
    std::memcpy(row + block_info_offset(k, block), &info, sizeof(info));
    return scale * static_cast<float>(sum);
  }
};

#endif

}  // namespace lk::LK_ISA

#endif

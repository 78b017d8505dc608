// The ways to multiply weights with activations: as floats, as pairs of bf16, or as four bytes.
//
// Each arithmetic says what one step multiplies and how activations are packed for it. A step
// multiplies kStepWeights consecutive weights of 16 rows, in one 64-byte vector, with as many
// activations, which all rows share. multiply_add takes activations from a register, where several
// vectors of rows share them, or from memory: if GCC may choose, it keeps more of them in registers
// than there are.
//
// Where activations are quantised, a packed row holds for each block its scale and the number that
// sums over the block begin with, at block_info_offset(k, block).
#pragma once

#include "lk/kernels.h"
#include "lk/kernels/simd.h"

namespace lk::LK_ISA {

// The permutation that packs a block: element i of the packed block is element index[i] of the
// values. kOrder is the order of each eight values, and kWithin is how many lanes the permutation
// instruction can reach.
template <class Index, const uint8_t (&kOrder)[8], int kWithin>
struct PackOrder {
  alignas(64) Index index[kActBlock];
  constexpr PackOrder() : index() {
    for (int i = 0; i < kActBlock; ++i) {
      index[i] = static_cast<Index>(i % kWithin / 8 * 8 + kOrder[i % 8]);
    }
  }
};

constexpr int64_t act_blocks(int64_t k) { return (k + kActBlock - 1) / kActBlock; }

// What arithmetics with float sums have in common: sums begin at zero and need no scale, so a
// packed row holds nothing but activations.
template <int kBytes>
struct FloatSums {
  using Sum = F32x16;
  static constexpr int kActBytes = kBytes;

  static Sum begin(const char*) { return zeros(); }
  static Sum copy(Sum start) { return start; }
  static float scale(const char*) { return 1.0f; }
  static F32x16 value(Sum sum, float) { return sum; }
  static F32x16 add(Sum sum, float, F32x16 to) { return sum + to; }
  static int64_t block_info_offset(int64_t, int64_t) { return 0; }
  static int64_t row_bytes(int64_t k) { return act_blocks(k) * kActBlock * kActBytes; }
};

// Float weights and activations, for every CPU.
struct Floats : FloatSums<4> {
  using Weights = F32x16;
  using Act = F32x16;
  static constexpr int kStepWeights = 1;

  static Act act(const char* p) { return broadcast(*reinterpret_cast<const float*>(p)); }
  static Sum multiply_add(Sum sum, Weights w, Act a) { return fma(w, a, sum); }
  static Sum multiply_add(Sum sum, Weights w, const char* p) {
#if defined(__AVX512F__)
    asm("vfmadd231ps %2%{1to16%}, %1, %0"
        : "+v"(sum.v[0])
        : "v"(w.v[0]), "m"(*reinterpret_cast<const float*>(p)));
    return sum;
#else
    return fma(w, act(p), sum);
#endif
  }
  // Packs a block of activations in the order of unpacked weights, which is kOrder in each eight.
  // Returns the sum of the packed activations, as they were rounded.
  template <const uint8_t (&kOrder)[8]>
  static float pack(const float* values, char* row, int64_t block, int, int64_t) {
    std::memcpy(row + block * kActBlock * kActBytes, values, kActBlock * kActBytes);
    float sum = 0;
    for (int i = 0; i < kActBlock; ++i) sum += values[i];
    return sum;
  }
};

#if defined(__AVX512BF16__)

// Pairs of bf16: vdpbf16ps multiplies them, which is exact in float, and adds both products to a
// float.
struct Bf16Pairs : FloatSums<2> {
  using Weights = __m512bh;
  using Act = __m512bh;
  static constexpr int kStepWeights = 2;

  // Without `volatile`, GCC 12 loads activations early and once for all rows, and has no registers
  // to keep them in.
  static Act act(const char* p) {
    __m512i pair;
    asm volatile("vpbroadcastd %1, %0" : "=v"(pair) : "m"(*reinterpret_cast<const int32_t*>(p)));
    return (__m512bh)pair;
  }
  static Sum multiply_add(Sum sum, Weights w, Act a) { return {_mm512_dpbf16_ps(sum.v[0], w, a)}; }
  static Sum multiply_add(Sum sum, Weights w, const char* p) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0"
        : "+v"(sum.v[0])
        : "v"(w), "m"(*reinterpret_cast<const int32_t*>(p)));
    return sum;
  }
  template <const uint8_t (&kOrder)[8]>
  static float pack(const float* values, char* row, int64_t block, int, int64_t) {
    static constexpr PackOrder<uint16_t, kOrder, 32> kPackOrder;
    const __m512bh pairs =
        _mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + 16), _mm512_loadu_ps(values));
    _mm512_storeu_si512(
        row + block * kActBlock * kActBytes,
        _mm512_permutexvar_epi16(_mm512_load_si512(kPackOrder.index), (__m512i)pairs));
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    return _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), pairs, ones));
  }
};

#endif

#if defined(__AVX512VNNI__)

// Four bytes: vpdpbusd multiplies four unsigned bytes (weights) with four signed bytes
// (activations) and adds the products to an int32. Each block of activations has its own scale.
// Weights are made unsigned by adding kOffset.
template <int kOffset>
struct Int8Quads {
  using Weights = __m512i;
  using Sum = __m512i;
  using Act = __m512i;
  static constexpr int kStepWeights = 4;
  static constexpr int kActBytes = 1;

  // A packed row holds this for each block, behind all activations. `correction` is -kOffset times
  // the sum of the block, so that sums which begin with it are those of the signed weights.
  struct BlockInfo {
    float scale;
    int32_t correction;
  };
  static int64_t block_info_offset(int64_t k, int64_t block) {
    return act_blocks(k) * kActBlock + block * static_cast<int64_t>(sizeof(BlockInfo));
  }

  static Sum begin(const char* info) {
    return _mm512_set1_epi32(reinterpret_cast<const BlockInfo*>(info)->correction);
  }
  // Hides from the compiler that all sums begin with the same number. Otherwise GCC 12 keeps it in
  // one register and copies registers in the inner loop.
  static Sum copy(Sum start) {
    asm("" : "+v"(start));
    return start;
  }
  static Act act(const char* p) {
    __m512i four;
    asm volatile("vpbroadcastd %1, %0" : "=v"(four) : "m"(*reinterpret_cast<const int32_t*>(p)));
    return four;
  }
  // The intrinsic is not used: its vector type is not Sum's, and for each product GCC 12 would move
  // the sum to another register and back.
  static Sum multiply_add(Sum sum, Weights w, Act a) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(a));
    return sum;
  }
  static Sum multiply_add(Sum sum, Weights w, const char* p) {
    asm("vpdpbusd %2%{1to16%}, %1, %0"
        : "+v"(sum)
        : "v"(w), "m"(*reinterpret_cast<const int32_t*>(p)));
    return sum;
  }
  static float scale(const char* info) { return reinterpret_cast<const BlockInfo*>(info)->scale; }
  static F32x16 value(Sum sum, float scale) {
    return F32x16{_mm512_cvtepi32_ps(sum)} * broadcast(scale);
  }
  static F32x16 add(Sum sum, float scale, F32x16 to) {
    return fma(F32x16{_mm512_cvtepi32_ps(sum)}, broadcast(scale), to);
  }

  template <const uint8_t (&kOrder)[8]>
  static float pack(const float* values, char* row, int64_t block, int block_log2, int64_t k) {
    static constexpr PackOrder<uint8_t, kOrder, 16> kPackOrder;
    const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPackOrder.index));
    const int64_t begin = block << block_log2;
    const int64_t left = act_blocks(k) * kActBlock - begin;
    const int64_t size = left < int64_t{1} << block_log2 ? left : int64_t{1} << block_log2;
    // Compared as integers, magnitudes have the same order as floats, and infinity and NaN are
    // larger than all numbers. So a block with one of them gets it as its scale, and none of its
    // sums looks finite.
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < size; i += kLanes) {
      largest = _mm512_max_epu32(largest,
                                 _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(values + i))));
    }
    const float top = float_of(_mm512_reduce_max_epu32(largest));
    const __m512 inverse = _mm512_set1_ps(top > 0 ? 127.0f / top : 0.0f);
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < size; i += kActBlock) {
      const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + i), inverse));
      const __m512i b =
          _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + i + 16), inverse));
      const __m256i bytes = _mm256_set_m128i(_mm512_cvtsepi32_epi8(b), _mm512_cvtsepi32_epi8(a));
      total = _mm256_dpbusd_epi32(total, _mm256_set1_epi8(1), bytes);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + begin + i),
                          _mm256_shuffle_epi8(bytes, order));
    }
    const int32_t sum = _mm512_reduce_add_epi32(_mm512_zextsi256_si512(total));
    auto& info = *reinterpret_cast<BlockInfo*>(row + block_info_offset(k, block));
    info.scale = top / 127.0f;
    info.correction = -kOffset * sum;
    return info.scale * static_cast<float>(sum);
  }
  static int64_t row_bytes(int64_t k) { return block_info_offset(k, act_blocks(k)); }
};

#endif

}  // namespace lk::LK_ISA

// How weights in lanes meet activations: as floats, as pairs of bf16, or as bytes. Each says what
// one step multiplies (kWidth consecutive weights of 16 rows, in one 64-byte vector, with as many
// activations that all rows share) and how activations are packed for it. about(k, block) is where
// in a packed row stands what sums over a block begin with and are scaled by. multiply_add takes
// activations from a register (where several rows share it) or from memory: left to choose, GCC
// keeps more of them in registers than there are.
#pragma once

#include "lk/kernels.h"
#include "lk/simd.h"

namespace lk::LK_ISA {

// Where each of a block's activations comes from, kOrder saying it for each eight; kWithin is the
// number of lanes that a permutation reaches.
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

// What arithmetics with float sums share: a sum begins at zero and is its own value, and a packed
// row has nothing behind its activations.
template <int kBytes>
struct FloatSums {
  using Sum = F32x16;
  static constexpr int kActBytes = kBytes;

  static Sum begin(const char*) { return zeros(); }
  static Sum copy(Sum start) { return start; }
  static float scale(const char*) { return 1.0f; }
  static F32x16 value(Sum sum, float) { return sum; }
  static F32x16 add(Sum sum, float, F32x16 to) { return sum + to; }
  static int64_t about(int64_t, int64_t) { return 0; }
  static int64_t row_bytes(int64_t k) { return act_blocks(k) * kActBlock * kActBytes; }
};

// Every CPU: float weights and activations.
struct Floats : FloatSums<4> {
  using Weights = F32x16;
  using Act = F32x16;
  static constexpr int kWidth = 1;

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
  // A block of activations in the order that unpacked weights have, kOrder in each eight. Returns
  // the sum of what they have become.
  template <const uint8_t (&kOrder)[8]>
  static float pack(const float* values, char* row, int64_t block, int, int64_t) {
    std::memcpy(row + block * kActBlock * kActBytes, values, kActBlock * kActBytes);
    float sum = 0;
    for (int i = 0; i < kActBlock; ++i) sum += values[i];
    return sum;
  }
};

#if defined(__AVX512BF16__)

// vdpbf16ps multiplies pairs of bf16, exact in float, and adds both products to a float.
struct Pairs : FloatSums<2> {
  using Weights = __m512bh;
  using Act = __m512bh;
  static constexpr int kWidth = 2;

  // Volatile, or GCC 12 would load what several rows need once and have no registers for it.
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

// vpdpbusd multiplies four unsigned bytes (weights) with four signed ones (activations). Each block
// of activations has a scale of its own. kOffset is what the weights' bytes are too large by.
template <int kOffset>
struct Bytes {
  using Weights = __m512i;
  using Sum = __m512i;
  using Act = __m512i;
  static constexpr int kWidth = 4;
  static constexpr int kActBytes = 1;

  // Behind the activations of a row: for each block its scale, and -kOffset times its sum.
  struct Block {
    float scale;
    int32_t correction;
  };
  static int64_t about(int64_t k, int64_t block) {
    return act_blocks(k) * kActBlock + block * static_cast<int64_t>(sizeof(Block));
  }

  static Sum begin(const char* block) {
    return _mm512_set1_epi32(reinterpret_cast<const Block*>(block)->correction);
  }
  // Hides from the compiler that sums begin equal: GCC 12 would keep them in one register and move
  // them about in the inner loop.
  static Sum copy(Sum start) {
    asm("" : "+v"(start));
    return start;
  }
  static Act act(const char* p) {
    __m512i four;
    asm volatile("vpbroadcastd %1, %0" : "=v"(four) : "m"(*reinterpret_cast<const int32_t*>(p)));
    return four;
  }
  // Not the intrinsic: its vector type is another one than Sum's, and for each product GCC 12 moves
  // the sum from a register to another and back.
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
  static float scale(const char* block) { return reinterpret_cast<const Block*>(block)->scale; }
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
    // As integers magnitudes have the same order, with infinity and NaN above all numbers: the
    // scale becomes one of them, and no sum that it scales passes for a number.
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
    auto& mine = *reinterpret_cast<Block*>(row + about(k, block));
    mine.scale = top / 127.0f;
    mine.correction = -kOffset * sum;
    return mine.scale * static_cast<float>(sum);
  }
  static int64_t row_bytes(int64_t k) { return about(k, act_blocks(k)); }
};

#endif

}  // namespace lk::LK_ISA

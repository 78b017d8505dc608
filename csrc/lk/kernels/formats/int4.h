// int4 weights: codes 0 to 15 stand for -8 to 7. A zero point other than 8 shifts the values of a
// whole group: the sum of the group's activations, times the shift, is subtracted from its dot
// product.
#pragma once

#include "lk/kernels/nibbles.h"

namespace lk::LK_ISA {

struct Int4Values {
  alignas(64) static constexpr float kFloat[16] = {-8, -7, -6, -5, -4, -3, -2, -1,
                                                   0,  1,  2,  3,  4,  5,  6,  7};
  alignas(64) static constexpr uint16_t kBf16[16] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
                                                     0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040,
                                                     0x4080, 0x40a0, 0x40c0, 0x40e0};
};
constexpr float kInt4ZeroPoint = 8;  // of the tables above

struct Int4 : Nibbles<Int4Values> {};
struct Int4Zero : Nibbles<Int4Values> {
  static constexpr bool kZeroPoints = true;
};

#if defined(__AVX512VNNI__)

struct Int4Act8 {
  using Math = Int8Quads<8>;
  static constexpr int kUnitWeights = 8;
  static constexpr uint8_t kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  static void unpack(U32x16 bits, __m512i* w) {
    const __m512i nibble = _mm512_set1_epi8(15);
    w[0] = _mm512_and_si512((__m512i)bits.v[0], nibble);
    w[1] = _mm512_and_si512(_mm512_srli_epi16((__m512i)bits.v[0], 4), nibble);
  }
};
struct Int4ZeroAct8 : Int4Act8 {
  static constexpr bool kZeroPoints = true;
};

#else

using Int4Act8 = Int4;
using Int4ZeroAct8 = Int4Zero;

#endif

}  // namespace lk::LK_ISA

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

#if defined(__AVX2__) && !defined(__AVX512BF16__)

struct Int4 {
  using Math = Int16Pairs<0>;
  static constexpr int kUnitWeights = 8;
  // Pair i is nibble i of both halves of the unit.
  static constexpr uint8_t kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  static void unpack(U32x16 bits, I32x16* w) {
    bits = bits ^ 0x88888888;  // Now codes are two's complement.
    for (int i = 0; i < 4; ++i) w[i] = shift_halves(bits, 12 - 4 * i, 12);
  }
};

#else

struct Int4 : Nibbles<Int4Values> {};

#endif

struct Int4Zero : Int4 {
  static constexpr bool kZeroPoints = true;
};

#if defined(__AVX2__)

struct Int4Act8 {
  using Math = Bytes<8>;
  static constexpr int kUnitWeights = 8;
  static constexpr uint8_t kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  static void unpack(U32x16 bits, I32x16* w) {
    w[0] = as_integers(bits & 0x0f0f0f0f);
    w[1] = as_integers(bits >> 4 & 0x0f0f0f0f);
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

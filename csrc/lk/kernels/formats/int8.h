// int8 weights: four along K in a unit.
#pragma once

#include "lk/kernels/arithmetic.h"

namespace lk::LK_ISA {

struct Int8Groups {
  static constexpr int kUnitWeights = 4;
#if defined(__AMX_TILE__)
  using Math = Bf16Pairs;
  static constexpr uint8_t kOrder[8] = {0, 2, 1, 3, 4, 6, 5, 7};
  static void unpack(U32x16 bits, Bf16Pairs::Weights* w) {
    // Bytes become floats, whose upper halves are the bf16: eight bits are exact in bf16.
    for (int i = 0; i < 2; ++i) {
      const auto low = (__m512i)signed_byte(bits, i).v[0];
      const auto high = (__m512i)signed_byte(bits, i + 2).v[0];
      w[i] = (__m512bh)_mm512_ternarylogic_epi32(_mm512_srli_epi32(low, 16), high,
                                                 _mm512_set1_epi32(0xffff), 0xf4);
    }
  }
#elif defined(__AVX2__)
  // Also where pairs of bf16 are as fast, because an integer is unpacked by 3 instructions for 64
  // weights, and a bf16 by 15: on Zen 5, 64 tokens in all take 0.93 of the time, 512 take 0.81, and
  // 2048 take 1.02.
  using Math = Int16Pairs<0>;
  static constexpr uint8_t kOrder[8] = {0, 2, 1, 3, 4, 6, 5, 7};
  static void unpack(U32x16 bits, I32x16* w) {
    w[0] = shift_halves(bits, 8, 8);
    w[1] = shift_halves(bits, 0, 8);
  }
#else
  using Math = Floats;
  static constexpr uint8_t kOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  static void unpack(U32x16 bits, F32x16* w) {
    for (int i = 0; i < kUnitWeights; ++i) w[i] = signed_byte(bits, i);
  }
#endif
};
// Each row has one scale.
struct Int8 : Int8Groups {
  static constexpr bool kNoGroupScales = true;
};

#if defined(LK_VPDPBUSD)

struct Int8GroupsAct8 {
  using Math = Bytes<128>;  // unpack adds 128 by flipping the sign bit
  static constexpr bool kStoredAsMultiplied = true;
  static constexpr int kUnitWeights = 4;
  static constexpr uint8_t kOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  static void unpack(U32x16 bits, I32x16* w) { w[0] = as_integers(bits ^ 0x80808080); }
};
struct Int8Act8 : Int8GroupsAct8 {
  static constexpr bool kNoGroupScales = true;
};

#else

// Without vpdpbusd, sums of products of bytes would have to fit into 16 bits, which those of 8-bit
// weights do not.
using Int8Act8 = Int8;
using Int8GroupsAct8 = Int8Groups;

#endif

}  // namespace lk::LK_ISA

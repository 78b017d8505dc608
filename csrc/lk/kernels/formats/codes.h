// Codes of 2 to 6 bits as blocks have them (blocks.h): 16 weights a unit, in planes of bits.
//
// Each number of bits has one way to unpack, into four vectors of bytes; the arithmetics that
// multiply them go on from there. An unpacked weight is its code less kOffset, half of the range.
#pragma once

#include "lk/kernels/arithmetic.h"

namespace lk::LK_ISA {

// Bits 0 to 3 of a byte, for each byte of a lane, out of the lane's 16 low bits.
inline U32x16 spread_nibbles(U32x16 half) {
  half = (half | half << 8) & 0x00ff00ff;
  return (half | half << 4) & 0x0f0f0f0f;
}
// Shifts left by n, or right by -n.
inline U32x16 shifted(U32x16 a, int n) { return n >= 0 ? a << n : a >> -n; }

template <int kBits>
struct Codes {
  static constexpr int kOffset = 1 << (kBits - 1);
  static constexpr int kUnitWeights = 16;
  static constexpr int kLowBits = kBits >= 4 ? 4 : 2;
  static constexpr int kHighBits = kBits - kLowBits;
  static constexpr int kLowWords = kLowBits / 2;
  static constexpr bool kHalf = kHighBits == 1;
  static constexpr int kWords = kLowWords + (kHighBits == 2);

  // The codes of a unit, one in each byte, in four steps. Byte b of step t is weight
  // code_place(b, t).
  static void steps(const U32x16* words, U32x16* step) {
    U32x16 high{};
    if constexpr (kHighBits == 1) high = spread_nibbles(words[kLowWords]);
    if constexpr (kHighBits == 2) high = words[kLowWords];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      if constexpr (kLowBits == 4) {
        step[t] = words[t / 2] >> 4 * (t % 2) & 0x0f0f0f0f;
      } else {
        step[t] = words[0] >> 2 * t & 0x03030303;
      }
      if constexpr (kHighBits != 0) {
        constexpr uint32_t kMask = 0x01010101u * ((1u << kHighBits) - 1) << kLowBits;
        step[t] = step[t] | (shifted(high, kLowBits - kHighBits * t) & kMask);
      }
    }
  }
};

#if defined(__AVX2__)

// With activations of 16 bits. The even bytes of a step come first.
template <int kBits>
struct Codes16 : Codes<kBits> {
  using Math = Int16Pairs;
  static constexpr uint8_t kOrder[8] = {0, 4, 2, 6, 1, 5, 3, 7};
  static void unpack(const U32x16* words, I32x16* w) {
    U32x16 step[4];
    Codes<kBits>::steps(words, step);
    for (int t = 0; t < 4; ++t) {
      w[2 * t] = less_offset(step[t] & 0x00ff00ff);
      w[2 * t + 1] = less_offset(step[t] >> 8 & 0x00ff00ff);
    }
  }

 private:
  static I32x16 less_offset(U32x16 pairs) {
    typedef int16_t ShortVector __attribute__((vector_size(kVectorBytes)));
    I32x16 result;
    for (int i = 0; i < kVectors; ++i) {
      result.v[i] = (IntVector)((ShortVector)pairs.v[i] - Codes<kBits>::kOffset);
    }
    return result;
  }
};

// With activations of 8 bits.
template <int kBits>
struct Codes8 : Codes<kBits> {
  using Math = Bytes<Codes<kBits>::kOffset>;
  static constexpr uint8_t kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  static void unpack(const U32x16* words, I32x16* w) {
    U32x16 step[4];
    Codes<kBits>::steps(words, step);
    for (int t = 0; t < 4; ++t) w[t] = as_integers(step[t]);
  }
};

#else

template <int kBits>
struct Codes16 : Codes<kBits> {
  using Math = Floats;
  static constexpr uint8_t kOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  static void unpack(const U32x16* words, F32x16* w) {
    U32x16 step[4];
    Codes<kBits>::steps(words, step);
    for (int t = 0; t < 4; ++t) {
      for (int b = 0; b < 4; ++b) {
        w[code_place(b, t)] = to_float(step[t] >> 8 * b & 0xff) - Codes<kBits>::kOffset;
      }
    }
  }
};
template <int kBits>
using Codes8 = Codes16<kBits>;

#endif

}  // namespace lk::LK_ISA

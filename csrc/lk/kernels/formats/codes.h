// Weights as blocks have them (blocks.h), once they are bytes, and how those are multiplied.
//
// A type C of weights has C::steps, which turns the words of a unit into vectors of four bytes for
// each row, one for each four weights. The bytes are unsigned: a weight is its byte less
// C::kOffset. Byte b of step t is the weight C::kByteOrder[b + t % 2 * 4] of the eight that steps t
// and t ^ 1 have. C::steps_of_two does so for two vectors of rows. In16Bits and In8Bits make a
// format of C for activations of so many bits.
#pragma once

#include <type_traits>

#include "lk/codebooks.h"
#include "lk/kernels/arithmetic.h"

namespace lk::LK_ISA {

// Bits 0 to 3 of a byte, for each byte of a lane, out of the lane's 16 low bits.
inline U32x16 spread_nibbles(U32x16 half) {
  half = (half | half << 8) & 0x00ff00ff;
  return (half | half << 4) & 0x0f0f0f0f;
}
// Shifts left by n, or right by -n.
inline U32x16 shifted(U32x16 a, int n) { return n >= 0 ? a << n : a >> -n; }

// Codes of 2 to 6 bits: 16 weights a unit, in planes of bits. kOffset is half of their range.
template <int kBits>
struct Codes {
  static constexpr int kOffset = 1 << (kBits - 1);
  static constexpr int kUnitWeights = 16;
  static constexpr int kLowBits = kBits >= 4 ? 4 : 2;
  static constexpr int kHighBits = kBits - kLowBits;
  static constexpr int kLowWords = kLowBits / 2;
  static constexpr bool kHalf = kHighBits == 1;
  static constexpr int kWords = kLowWords + (kHighBits == 2);
  static constexpr uint8_t kByteOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // code_place

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

// Codes of 4 bits, each the number of one of the 16 integers of IQ4_NL and IQ4_XS.
struct TableCodes : Codes<4> {
  static constexpr int kOffset = 128;

  static void steps(const U32x16* words, U32x16* step) {
    Codes<4>::steps(words, step);
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) step[t] = lookup_bytes(codebooks::kIq4NlPlus128, step[t]);
  }
};

#if defined(__AVX2__)

// Steps of four bytes, as they are or, kVectorsOfStep being 2, as their even bytes and their odd
// ones, each in 16 bits.
template <class C, int kVectorsOfStep>
struct InIntegers : C {
  static constexpr int kByteSteps = C::kUnitWeights / 4;

  static inline __attribute__((always_inline)) void unpack(const U32x16* words, I32x16* w) {
    U32x16 step[kByteSteps];
    C::steps(words, step);
    widen(step, w);
  }
  static void unpack_two(const U32x16* words, const U32x16* words2, I32x16* w, I32x16* w2) {
    U32x16 step[kByteSteps], step2[kByteSteps];
    C::steps_of_two(words, words2, step, step2);
    widen(step, w);
    widen(step2, w2);
  }

 private:
  static void widen(const U32x16* step, I32x16* w) {
#pragma GCC unroll 8
    for (int t = 0; t < kByteSteps; ++t) {
      if constexpr (kVectorsOfStep == 1) {
        w[t] = as_integers(step[t]);
      } else {
        w[2 * t] = as_integers(step[t] & 0x00ff00ff);
        w[2 * t + 1] = as_integers(odd_bytes(step[t]));
      }
    }
  }
};

// With activations of 16 bits.
template <class C>
struct In16Bits : InIntegers<C, 2> {
  using Math = Int16Pairs<C::kOffset>;
  static constexpr uint8_t kOrder[8] = {C::kByteOrder[0], C::kByteOrder[2], C::kByteOrder[1],
                                        C::kByteOrder[3], C::kByteOrder[4], C::kByteOrder[6],
                                        C::kByteOrder[5], C::kByteOrder[7]};
};

// Whether sums of products of bytes are exact. Without vpdpbusd, sums of two have to fit into 16
// bits (instructions.h): the bytes of IQ2 and IQ3_XXS are 126 at most, those of IQ4 up to 241.
#if defined(LK_VPDPBUSD)
template <class C>
constexpr bool kBytesFit = true;
#else
template <class C>
constexpr bool kBytesFit = C::kOffset <= 64;
#endif

template <class C>
struct InBytes : InIntegers<C, 1> {
  using Math = Bytes<C::kOffset>;
  static constexpr const uint8_t (&kOrder)[8] = C::kByteOrder;
};
// With activations of 8 bits where that is exact.
template <class C>
using In8Bits = std::conditional_t<kBytesFit<C>, InBytes<C>, In16Bits<C>>;

#else

template <class C>
struct In16Bits : C {
  using Math = Floats;
  static constexpr uint8_t kOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  static void unpack(const U32x16* words, F32x16* w) {
    constexpr int kSteps = C::kUnitWeights / 4;
    U32x16 step[kSteps];
    C::steps(words, step);
    for (int t = 0; t < kSteps; ++t) {
      for (int b = 0; b < 4; ++b) {
        w[t / 2 * 8 + C::kByteOrder[t % 2 * 4 + b]] =
            to_float(step[t] >> 8 * b & 0xff) - C::kOffset;
      }
    }
  }
};
template <class C>
using In8Bits = In16Bits<C>;

#endif

}  // namespace lk::LK_ISA

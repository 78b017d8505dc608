// e2m1 weights (OCP Microscaling Formats 1.0): mxfp4 and nvfp4 differ only in their scales.
#pragma once

#include "lk/kernels/nibbles.h"

namespace lk::LK_ISA {

struct E2m1Values {
  alignas(64) static constexpr float kFloat[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,
                                                   4.0f,  6.0f,  -0.0f, -0.5f, -1.0f, -1.5f,
                                                   -2.0f, -3.0f, -4.0f, -6.0f};
  alignas(64) static constexpr uint16_t kBf16[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
                                                     0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0,
                                                     0xc000, 0xc040, 0xc080, 0xc0c0};
};

#if defined(__AVX2__)

// Twice a value of e2m1 is an integer from -12 to 12.
struct TwiceE2m1 {
  alignas(16) static constexpr int8_t kSigned[16] = {0, 1,  2,  3,  4,  6,  8,  12,
                                                     0, -1, -2, -3, -4, -6, -8, -12};
  static constexpr int kOffset = 12;
  alignas(16) static constexpr uint8_t kUnsigned[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                        12, 11, 10, 9,  8,  6,  4,  0};
};

#endif
#if defined(__AVX2__) && !defined(__AVX512BF16__)

struct Fp4 {
  using Math = Int16Pairs<0>;
  static constexpr float kWeightUnit = 0.5f;
  static constexpr int kUnitWeights = 8;
  // Low nibbles come first, then high ones; of each, the even bytes first.
  static constexpr uint8_t kOrder[8] = {0, 4, 2, 6, 1, 5, 3, 7};
  static void unpack(U32x16 bits, I32x16* w) {
    for (int high = 0; high < 2; ++high) {
      const U32x16 bytes = lookup_bytes(TwiceE2m1::kSigned, bits >> 4 * high & 0x0f0f0f0f);
      w[2 * high] = shift_halves(bytes, 8, 8);
      w[2 * high + 1] = shift_halves(bytes, 0, 8);
    }
  }
};

#else

struct Fp4 : Nibbles<E2m1Values> {};

#endif
#if defined(__AVX2__)

struct Fp4Act8 {
  using Math = Bytes<TwiceE2m1::kOffset>;
  static constexpr float kWeightUnit = 0.5f;
  static constexpr int kUnitWeights = 8;
  static constexpr uint8_t kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  static void unpack(U32x16 bits, I32x16* w) {
    w[0] = as_integers(lookup_bytes(TwiceE2m1::kUnsigned, bits & 0x0f0f0f0f));
    w[1] = as_integers(lookup_bytes(TwiceE2m1::kUnsigned, bits >> 4 & 0x0f0f0f0f));
  }
};

#else

using Fp4Act8 = Fp4;

#endif

}  // namespace lk::LK_ISA

// Q4_1, Q5_0, Q5_1 and IQ4_NL of GGUF, whose blocks of 32 weights are groups, and IQ4_XS, whose
// weights are those of IQ4_NL (blocks.h).
#pragma once

#include "lk/kernels/formats/in_blocks.h"

namespace lk::LK_ISA {

// Q4_1 and Q5_1: a scale, and what the weights of code 0 are.
template <int kOffset>
struct ScaleAndLeast {
  static constexpr int kWeights = 32, kGroup = 32, kWords = 1, kHalves = 0;
  static constexpr bool kLow = true;
  U32x16 both;

  explicit ScaleAndLeast(const BlockScales& block) : both(block.word(0)) {}
  inline __attribute__((always_inline)) void group(int, F32x16& scale, F32x16& low) const {
    scale = half_to_float(both, 0);
    low = zeros() - half_to_float(both, 1) - scale * kOffset;
  }
};

// Q5_0 and IQ4_NL: a scale.
struct OneScale {
  static constexpr int kWeights = 32, kGroup = 32, kWords = 0, kHalves = 1;
  static constexpr bool kLow = false;
  U32x16 half;

  explicit OneScale(const BlockScales& block) : half(block.half(0)) {}
  inline __attribute__((always_inline)) void group(int, F32x16& scale, F32x16&) const {
    scale = half_to_float(half, 0);
  }
};

// IQ4_XS: eight scales of 6 bits, less 32. Their high two bits are beside d, the low four bits are
// in the second word.
struct SplitSixBits {
  static constexpr int kWeights = kBlockWeights, kGroup = 32, kWords = 2, kHalves = 0;
  static constexpr bool kLow = false;
  F32x16 d;
  U32x16 high, low_bits;

  explicit SplitSixBits(const BlockScales& block)
      : d(half_to_float(block.word(0), 0)), high(block.word(0) >> 16), low_bits(block.word(1)) {}
  inline __attribute__((always_inline)) void group(int j, F32x16& scale, F32x16&) const {
    scale = d * (to_float((low_bits >> 4 * j & 15) | (high >> 2 * j & 3) << 4) - 32);
  }
};

using Q41 = InBlocks<ScaleAndLeast<Codes<4>::kOffset>, In16Bits<Codes<4>>>;
using Q41Act8 = InBlocks<ScaleAndLeast<Codes<4>::kOffset>, In8Bits<Codes<4>>>;
using Q50 = InBlocks<OneScale, In16Bits<Codes<5>>>;
using Q50Act8 = InBlocks<OneScale, In8Bits<Codes<5>>>;
using Q51 = InBlocks<ScaleAndLeast<Codes<5>::kOffset>, In16Bits<Codes<5>>>;
using Q51Act8 = InBlocks<ScaleAndLeast<Codes<5>::kOffset>, In8Bits<Codes<5>>>;
using Iq4Nl = InBlocks<OneScale, In16Bits<TableCodes>>;
using Iq4NlAct8 = InBlocks<OneScale, In8Bits<TableCodes>>;
using Iq4Xs = InBlocks<SplitSixBits, In16Bits<TableCodes>>;
using Iq4XsAct8 = InBlocks<SplitSixBits, In8Bits<TableCodes>>;

}  // namespace lk::LK_ISA

// IQ1, IQ2 and IQ3 of GGUF (blocks.h): a code is the number of an entry of a table, which has four
// or eight weights or their magnitudes. What blocks keep beside the codes: scales, signs, and high
// bits of codes.
#pragma once

#include "lk/kernels/formats/entries.h"
#include "lk/kernels/formats/entries_in_bytes.h"
#include "lk/kernels/formats/entries_in_levels.h"
#include "lk/kernels/formats/in_blocks.h"

namespace lk::LK_ISA {

// Scales: IQ2_XXS and IQ3_XXS have 4 bits of each group's word, plus 1/2.
template <int kFactor>
struct ScalesBesideSigns {
  static constexpr int kWeights = kBlockWeights, kGroup = 32, kWords = 8, kHalves = 1;
  static constexpr bool kLow = false;
  F32x16 d;
  U32x16 words[8];

  explicit ScalesBesideSigns(const BlockScales& block)
      : d(half_to_float(block.half(0), 0) * (0.5f / kFactor)) {
    for (int i = 0; i < 8; ++i) words[i] = block.word(i);
  }
  inline __attribute__((always_inline)) void group(int j, F32x16& scale, F32x16&) const {
    scale = d * (to_float(words[j] >> 28) * 2 + 1);
  }
};

// IQ2_XS and IQ2_S: 4 bits for each group of 16 in two words, plus 1/2. IQ3_S: 4 bits for each
// group of 32 in one word, twice that plus 1.
template <int kSize, int kShared, int kFactor>
struct NibbleScales {
  static constexpr int kWeights = kBlockWeights, kGroup = kSize;
  static constexpr int kWords = kShared + kWeights / kGroup / 8, kHalves = 1;
  static constexpr bool kLow = false;
  F32x16 d;
  U32x16 nibbles[kWords - kShared];

  explicit NibbleScales(const BlockScales& block)
      : d(half_to_float(block.half(0), 0) * (1.0f / kFactor)) {
    for (int i = kShared; i < kWords; ++i) nibbles[i - kShared] = block.word(i);
  }
  inline __attribute__((always_inline)) void group(int j, F32x16& scale, F32x16&) const {
    scale = d * (to_float(nibbles[j / 8] >> 4 * (j % 8) & 15) * 2 + 1);
  }
};

// IQ1_S: three bits of each group's half of a word.
struct Iq1SScales {
  static constexpr int kWeights = kBlockWeights, kGroup = 32, kWords = 4, kHalves = 1;
  static constexpr bool kLow = false;
  F32x16 d;
  U32x16 words[4];

  explicit Iq1SScales(const BlockScales& block) : d(half_to_float(block.half(0), 0) * (1.0f / 8)) {
    for (int i = 0; i < 4; ++i) words[i] = block.word(i);
  }
  inline __attribute__((always_inline)) void group(int j, F32x16& scale, F32x16&) const {
    scale = d * (to_float(words[j / 2] >> (j % 2 * 16 + 12) & 7) * 2 + 1);
  }
};

// IQ1_M: three bits for each group of 16, four times in each of four halves of words, whose highest
// four bits are a fourth of d.
struct Iq1MScales {
  static constexpr int kWeights = kBlockWeights, kGroup = 16, kWords = 6, kHalves = 0;
  static constexpr bool kLow = false;
  U32x16 words[2];
  F32x16 d;

  explicit Iq1MScales(const BlockScales& block) : words{block.word(4), block.word(5)} {
    const U32x16 low = (words[0] >> 12 & 0xf) | (words[0] >> 24 & 0xf0);
    const U32x16 high = (words[1] >> 4 & 0xf00) | (words[1] >> 16 & 0xf000);
    d = half_to_float(low | high, 0) * (1.0f / 8);
  }
  inline __attribute__((always_inline)) void group(int j, F32x16& scale, F32x16&) const {
    scale = d * (to_float(words[j / 8] >> (j / 4 % 2 * 16 + j % 4 * 3) & 7) * 2 + 1);
  }
};

using Iq2XxsScales = ScalesBesideSigns<4>;
using Iq2XsScales = NibbleScales<16, 0, 8>;
using Iq2SScales = NibbleScales<16, 2, 8>;
using Iq3XxsScales = ScalesBesideSigns<2>;
using Iq3SScales = NibbleScales<32, 2, 1>;

using Iq1S = InBlocks<Iq1SScales, In16Bits<Iq1SEntries>>;
using Iq1SAct8 = InBlocks<Iq1SScales, In8Bits<Iq1SEntries>>;
using Iq1M = InBlocks<Iq1MScales, In16Bits<Iq1MEntries>>;
using Iq1MAct8 = InBlocks<Iq1MScales, In8Bits<Iq1MEntries>>;
using Iq2Xxs = InBlocks<Iq2XxsScales, In16Bits<Iq2XxsEntries>>;
using Iq2XxsAct8 = InBlocks<Iq2XxsScales, In8Bits<Iq2XxsEntries>>;
using Iq2Xs = InBlocks<Iq2XsScales, In16Bits<Iq2XsEntries>>;
using Iq2XsAct8 = InBlocks<Iq2XsScales, In8Bits<Iq2XsEntries>>;
using Iq2S = InBlocks<Iq2SScales, In16Bits<Iq2SEntries>>;
using Iq2SAct8 = InBlocks<Iq2SScales, In8Bits<Iq2SEntries>>;
using Iq3Xxs = InBlocks<Iq3XxsScales, In16Bits<Iq3XxsEntries>>;
using Iq3XxsAct8 = InBlocks<Iq3XxsScales, In8Bits<Iq3XxsEntries>>;
using Iq3S = InBlocks<Iq3SScales, In16Bits<Iq3SEntries>>;
using Iq3SAct8 = InBlocks<Iq3SScales, In8Bits<Iq3SEntries>>;

}  // namespace lk::LK_ISA

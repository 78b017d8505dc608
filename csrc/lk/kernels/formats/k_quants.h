// The K-quants of GGUF: Q2_K, Q3_K, Q4_K, Q5_K and Q6_K (blocks.h). They differ in the bits of a
// code and in how a group's scale and minimum are packed.
#pragma once

#include "lk/kernels/formats/in_blocks.h"

namespace lk::LK_ISA {

// Q4_K and Q5_K: eight scales and eight minimums of 6 bits in three words. Those of groups 0 to 3
// are the low bits of the bytes of the first two; the third has the low four bits of the others,
// whose high bits are above those of the first.
template <int kOffset>
struct SixBits {
  static constexpr int kWeights = kBlockWeights, kGroup = 32, kWords = 4, kHalves = 0;
  static constexpr bool kLow = true;
  F32x16 d, dmin;
  U32x16 scales, minimums, rest;

  explicit SixBits(const BlockScales& block)
      : d(half_to_float(block.word(0), 0)),
        dmin(half_to_float(block.word(0), 1)),
        scales(block.word(1)),
        minimums(block.word(2)),
        rest(block.word(3)) {}
  inline __attribute__((always_inline)) void group(int j, F32x16& scale, F32x16& low) const {
    const int shift = 8 * (j % 4);
    U32x16 s = scales >> shift & 63, m = minimums >> shift & 63;
    if (j >= 4) {
      s = (rest >> shift & 15) | (scales >> shift >> 2 & 0x30);
      m = (rest >> shift >> 4 & 15) | (minimums >> shift >> 2 & 0x30);
    }
    scale = d * to_float(s);
    low = dmin * to_float(m) - scale * kOffset;
  }
};

// Q2_K: scale and minimum are the nibbles of a byte.
struct NibblePairs {
  static constexpr int kWeights = kBlockWeights, kGroup = 16, kWords = 5, kHalves = 0;
  static constexpr bool kLow = true;
  F32x16 d, dmin;
  U32x16 bytes[4];

  explicit NibblePairs(const BlockScales& block)
      : d(half_to_float(block.word(4), 0)), dmin(half_to_float(block.word(4), 1)) {
    for (int i = 0; i < 4; ++i) bytes[i] = block.word(i);
  }
  inline __attribute__((always_inline)) void group(int j, F32x16& scale, F32x16& low) const {
    const U32x16 byte = bytes[j / 4] >> 8 * (j % 4);
    scale = d * to_float(byte & 15);
    low = dmin * to_float(byte >> 4 & 15) - scale * Codes<2>::kOffset;
  }
};

// Q3_K: sixteen scales of 6 bits, less 32. Words 0 and 1 have their low four bits, word 2 the high
// two.
struct SignedSixBits {
  static constexpr int kWeights = kBlockWeights, kGroup = 16, kWords = 3, kHalves = 1;
  static constexpr bool kLow = false;
  F32x16 d;
  U32x16 words[3];

  explicit SignedSixBits(const BlockScales& block) : d(half_to_float(block.half(0), 0)) {
    for (int i = 0; i < 3; ++i) words[i] = block.word(i);
  }
  inline __attribute__((always_inline)) void group(int j, F32x16& scale, F32x16&) const {
    const int byte = 8 * (j % 4), part = j / 4;
    const U32x16 s =
        (words[part % 2] >> byte >> 4 * (part / 2) & 15) | (words[2] >> byte >> 2 * part & 3) << 4;
    scale = d * (to_float(s) - 32);
  }
};

// Q6_K: a signed byte for each group.
struct SignedBytes {
  static constexpr int kWeights = kBlockWeights, kGroup = 16, kWords = 4, kHalves = 1;
  static constexpr bool kLow = false;
  F32x16 d;
  U32x16 bytes[4];

  explicit SignedBytes(const BlockScales& block) : d(half_to_float(block.half(0), 0)) {
    for (int i = 0; i < 4; ++i) bytes[i] = block.word(i);
  }
  inline __attribute__((always_inline)) void group(int j, F32x16& scale, F32x16&) const {
    scale = d * signed_byte(bytes[j / 4], j % 4);
  }
};

using Q2K = InBlocks<NibblePairs, In16Bits<Codes<2>>>;
using Q2KAct8 = InBlocks<NibblePairs, In8Bits<Codes<2>>>;
using Q3K = InBlocks<SignedSixBits, In16Bits<Codes<3>>>;
using Q3KAct8 = InBlocks<SignedSixBits, In8Bits<Codes<3>>>;
using Q4K = InBlocks<SixBits<Codes<4>::kOffset>, In16Bits<Codes<4>>>;
using Q4KAct8 = InBlocks<SixBits<Codes<4>::kOffset>, In8Bits<Codes<4>>>;
using Q5K = InBlocks<SixBits<Codes<5>::kOffset>, In16Bits<Codes<5>>>;
using Q5KAct8 = InBlocks<SixBits<Codes<5>::kOffset>, In8Bits<Codes<5>>>;
using Q6K = InBlocks<SignedBytes, In16Bits<Codes<6>>>;
using Q6KAct8 = InBlocks<SignedBytes, In8Bits<Codes<6>>>;

}  // namespace lk::LK_ISA

// IQ1, IQ2 and IQ3 of GGUF (blocks.h): a code is the number of an entry of a table, which has four
// or eight weights or their magnitudes.
//
// To find the entries of 16 rows takes about half of the time. The words of a unit are, in this
// order, its own and its bits of the block's words.
#pragma once

#include "lk/kernels/formats/in_blocks.h"

namespace lk::LK_ISA {

// Byte n of each lane.
inline U32x16 byte_of(U32x16 a, int n) { return a >> 8 * n & 0xff; }

// Four signs of seven bits in the low 28 bits, as bytes: the eighth bit is such that the number of
// ones is even.
inline U32x16 eight_signs(U32x16 sevens) {
  U32x16 bytes = (sevens & 0x7f) | (sevens << 1 & 0x7f00);
  bytes = bytes | (sevens << 2 & 0x7f0000) | (sevens << 3 & 0x7f000000);
  U32x16 parity = bytes ^ (bytes >> 4 & 0x07070707);
  parity = parity ^ parity >> 2;
  parity = parity ^ parity >> 1;
  return bytes | (parity & 0x01010101) << 7;
}

// Four magnitudes with the signs of bits 4 n to 4 n + 3, plus an offset that is larger than all of
// them.
template <int kOffset>
inline U32x16 with_signs(U32x16 magnitudes, U32x16 signs, int n) {
  typedef uint8_t ByteVector __attribute__((vector_size(kVectorBytes)));
  const U32x16 mask = bits_to_bytes(signs, n);
  for (int i = 0; i < kVectors; ++i) {
    const auto ones = (ByteVector)mask.v[i];
    magnitudes.v[i] =
        (UintVector)(((ByteVector)magnitudes.v[i] ^ ones) - ones + static_cast<uint8_t>(kOffset));
  }
  return magnitudes;
}

// What types of weights by entries have in common. Entries hold bytes in the order of K.
template <int kWeights, int kUnitWords, int kShared>
struct Entries {
  static constexpr int kUnitWeights = kWeights, kWords = kUnitWords, kSharedBits = kShared;
  static constexpr bool kHalf = false, kSlowUnpack = true;
  static constexpr uint8_t kByteOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
};

// An entry of eight weights, in steps 2 k and 2 k + 1, with byte k of the signs.
template <int kOffset>
inline void signed_entry(const uint32_t* table, U32x16 index, U32x16 signs, int k, U32x16* step) {
  U32x16 first, second;
  gather_pairs(table, index, &first, &second);
  step[2 * k] = with_signs<kOffset>(first, signs, 2 * k);
  step[2 * k + 1] = with_signs<kOffset>(second, signs, 2 * k + 1);
}

// Four bytes of entries; the block's word has four signs of seven bits.
struct Iq2XxsEntries : Entries<32, 1, 32> {
  static constexpr int kOffset = 64;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    const U32x16 signs = eight_signs(words[1]);
    for (int k = 0; k < 4; ++k) {
      signed_entry<kOffset>(codebooks::kIq2Xxs, byte_of(words[0], k), signs, k, step);
    }
  }
};

// Two entries of nine bits, each below seven bits of signs.
struct Iq2XsEntries : Entries<16, 1, 0> {
  static constexpr int kOffset = 64;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    const U32x16 signs = eight_signs((words[0] >> 9 & 0x7f) | (words[0] >> 25 << 7));
    for (int k = 0; k < 2; ++k) {
      signed_entry<kOffset>(codebooks::kIq2Xs, words[0] >> 16 * k & 511, signs, k, step);
    }
  }
};

// Two bytes of entries and two of signs; the block's words have two more bits of each entry.
struct Iq2SEntries : Entries<16, 1, 4> {
  static constexpr int kOffset = 64;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    for (int k = 0; k < 2; ++k) {
      const U32x16 index = byte_of(words[0], k) | (words[1] >> 2 * k & 3) << 8;
      signed_entry<kOffset>(codebooks::kIq2S, index, words[0] >> 16, k, step);
    }
  }
};

// Eight bytes of entries of four weights; the block's word has four signs of seven bits.
struct Iq3XxsEntries : Entries<32, 2, 32> {
  static constexpr int kOffset = 64;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    const U32x16 signs = eight_signs(words[2]);
    for (int t = 0; t < 8; ++t) {
      const U32x16 index = byte_of(words[t / 4], t % 4);
      step[t] = with_signs<kOffset>(gather(codebooks::kIq3Xxs, index), signs, t);
    }
  }
};

// Eight bytes of entries of four weights, and four of signs; the block's words have a ninth bit of
// each entry.
struct Iq3SEntries : Entries<32, 3, 8> {
  static constexpr int kOffset = 16;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    for (int t = 0; t < 8; ++t) {
      const U32x16 index = byte_of(words[t / 4], t % 4) | (words[3] >> t & 1) << 8;
      step[t] = with_signs<kOffset>(gather(codebooks::kIq3S, index), words[2], t);
    }
  }
};

// IQ1 has weights of -1, 0 and 1, and 1/8 is added to eight of them or subtracted. The table has
// eight times the weights, plus the offset, so that 1 is what is added.
struct Iq1 {
  static constexpr int kOffset = 16;
  static void entry(U32x16 index, U32x16 minus, int k, U32x16* step) {
    // No byte overflows.
    const U32x16 twice = (U32x16{} - minus) & 0x02020202;
    U32x16 bytes[2];
    gather_pairs(codebooks::kIq1Times8Plus16, index, &bytes[0], &bytes[1]);
    for (int i = 0; i < 2; ++i) step[2 * k + i] = bytes[i] + 0x01010101 - twice;
  }
};

// Four bytes of entries; the block's words have three more bits of each entry, a scale, and whether
// 1/8 is subtracted.
struct Iq1SEntries : Entries<32, 1, 16>, Iq1 {
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    for (int k = 0; k < 4; ++k) {
      const U32x16 index = byte_of(words[0], k) | (words[1] >> 3 * k & 7) << 8;
      entry(index, words[1] >> 15 & 1, k, step);
    }
  }
};

// Two bytes of entries; the block's words have for each three more bits, and whether 1/8 is
// subtracted.
struct Iq1MEntries : Entries<16, 0, 8>, Iq1 {
  static constexpr bool kHalf = true;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    for (int k = 0; k < 2; ++k) {
      const U32x16 index = byte_of(words[0], k) | (words[1] >> 4 * k & 7) << 8;
      entry(index, words[1] >> (4 * k + 3) & 1, k, step);
    }
  }
};

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

// The K-quants of GGUF: Q2_K, Q3_K, Q4_K, Q5_K and Q6_K (blocks.h).
//
// Their formats differ in the bits of a code and in how a group's scale and minimum are packed.
// MatmulArgs::scale has the words of all blocks, [block][word][row], and MatmulArgs::halves the
// halves.
#pragma once

#include "lk/blocks.h"
#include "lk/kernels/formats/codes.h"

namespace lk::LK_ISA {

// What the blocks of one group keep for 16 rows of a tile.
struct BlockScales {
  const char* words;
  const char* halves;
  int64_t rows;  // in the tile
  LaneMask lanes;

  U32x16 word(int64_t i) const { return load_units(words + i * rows * kUnitBytes, lanes); }
  U32x16 half(int64_t i) const { return load_half_units(halves + i * rows * 2, lanes); }
};

// Scales and minimums of blocks, by what one block keeps for 16 rows: Of. It is made once for all
// groups of a block, because most of the time goes into its conversions.
//
// What is loaded for a group is [kTileRows] scales, and as many minimums if Of::kLow.
template <class Of>
struct ScalesOf {
  static constexpr int kGroupsInBlock = kBlockWeights / Of::kGroup;

  static __attribute__((noinline)) void load_scales(const MatmulArgs& a, int64_t group,
                                                    float* out) {
    const int j = static_cast<int>(group % kGroupsInBlock);
    load_groups(a, group / kGroupsInBlock, j, j + 1, out);
  }
  // Those of all groups of a block.
  static __attribute__((noinline)) void load_block(const MatmulArgs& a, int64_t block, float* out) {
    load_groups(a, block, 0, kGroupsInBlock, out);
  }

 private:
  static const char* words(const MatmulArgs& a, int64_t block) {
    return static_cast<const char*>(a.scale) + block * Of::kWords * a.rows * kUnitBytes;
  }
  // Groups [begin, end) of a block. The next block's words are prefetched, a share for each group:
  // they are a second stream from memory beside the codes.
  static inline __attribute__((always_inline)) void load_groups(const MatmulArgs& a, int64_t block,
                                                                int begin, int end, float* out) {
    const int64_t bytes = Of::kWords * a.rows * kUnitBytes;
    const char* const next = words(a, block + 1);
    for (int64_t at = begin * bytes / kGroupsInBlock; at < end * bytes / kGroupsInBlock; at += 64) {
      __builtin_prefetch(next + at);
    }
    const char* const halves = a.halves + block * Of::kHalves * a.rows * 2;
    for (int64_t row = 0; row < a.rows; row += kLanes) {
      const int64_t lanes = min(a.rows - row, kLanes);
      const char* const at = words(a, block) + row * kUnitBytes;
      const Of of(BlockScales{at, halves + row * 2, a.rows, first_lanes(lanes)});
      float* to = out + row;
#pragma GCC unroll 16
      for (int j = begin; j < end; ++j, to += (1 + Of::kLow) * kTileRows) {
        F32x16 scale, low{};
        of.group(j, scale, low);
        store_some(to, scale, lanes);
        if constexpr (Of::kLow) store_some(to + kTileRows, low, lanes);
      }
    }
  }
};

// Q4_K and Q5_K: eight scales and eight minimums of 6 bits in three words. Those of groups 0 to 3
// are the low bits of the bytes of the first two; the third has the low four bits of the others,
// whose high bits are above those of the first.
template <int kOffset>
struct SixBits {
  static constexpr int kGroup = 32, kWords = 4, kHalves = 0;
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
  static constexpr int kGroup = 16, kWords = 5, kHalves = 0;
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
  static constexpr int kGroup = 16, kWords = 3, kHalves = 1;
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
  static constexpr int kGroup = 16, kWords = 4, kHalves = 1;
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

template <class Of, class Codes>
struct InBlocks : Codes, ScalesOf<Of> {};
template <class Of, class Codes>
  requires(Of::kLow)
struct InBlocks<Of, Codes> : Codes, ScalesOf<Of> {
  static constexpr bool kZeroPoints = true;
};

using Q2K = InBlocks<NibblePairs, Codes16<2>>;
using Q2KAct8 = InBlocks<NibblePairs, Codes8<2>>;
using Q3K = InBlocks<SignedSixBits, Codes16<3>>;
using Q3KAct8 = InBlocks<SignedSixBits, Codes8<3>>;
using Q4K = InBlocks<SixBits<Codes<4>::kOffset>, Codes16<4>>;
using Q4KAct8 = InBlocks<SixBits<Codes<4>::kOffset>, Codes8<4>>;
using Q5K = InBlocks<SixBits<Codes<5>::kOffset>, Codes16<5>>;
using Q5KAct8 = InBlocks<SixBits<Codes<5>::kOffset>, Codes8<5>>;
using Q6K = InBlocks<SignedBytes, Codes16<6>>;
using Q6KAct8 = InBlocks<SignedBytes, Codes8<6>>;

}  // namespace lk::LK_ISA

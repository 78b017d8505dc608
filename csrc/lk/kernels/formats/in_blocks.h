// Formats of blocks (blocks.h): weights of a type C (codes.h), and scales that are packed in a way
// of their own.
//
// MatmulArgs::scale has the words of all blocks, [block][word][row], and MatmulArgs::halves the
// halves.
#pragma once

#include "lk/blocks.h"
#include "lk/kernels/format_traits.h"
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

  // Prefetches part j of `parts` into L2, of so many words and halves. Into L1, as for the codes
  // (few_tokens.h), Q4_K took 1.04 times as long at 1 token on Zen 4, and IQ4_NL 1.14.
  inline __attribute__((always_inline)) void prefetch(int j, int parts, int of_words,
                                                      int of_halves) const {
    for (int i = j * of_words / parts; i < (j + 1) * of_words / parts; ++i) {
      __builtin_prefetch(words + i * rows * kUnitBytes, 0, 2);
    }
    for (int i = j * of_halves / parts; i < (j + 1) * of_halves / parts; ++i) {
      __builtin_prefetch(halves + i * rows * 2, 0, 2);
    }
  }
};

// Scales and minimums of blocks, by what one block keeps for 16 rows: Of. It is made once for all
// groups that are loaded at once, because its conversions take as long as those of several groups.
// Of::kWeights is the size of a block, Of::kGroup of a group, and Of::kWords and Of::kHalves count
// what the block keeps. The groups of the same block that are unpacked at once, kWeights weights
// long, are also loaded at once.
//
// What is loaded for a group is [kTileRows] scales, and as many minimums if Of::kLow.
template <class Of, int64_t kWeights>
struct ScalesOf {
  static constexpr int kGroupsInBlock = Of::kWeights / Of::kGroup;
  static constexpr int kGroupsAtOnce = max(min(Of::kWeights, kWeights) / Of::kGroup, 1);

  // Those of kGroupsAtOnce groups from `group` on, which is a multiple of that.
  static __attribute__((noinline)) void load_scales(const MatmulArgs& a, int64_t group,
                                                    float* out) {
    const int64_t block = group / kGroupsInBlock;
    const int64_t first = group % kGroupsInBlock;
#pragma GCC unroll 4
    for (int begin = 0; begin < kGroupsInBlock; begin += kGroupsAtOnce) {
      if (begin == first) load_groups(a, block, begin, begin + kGroupsAtOnce, out);
    }
  }

 private:
  // What a block keeps for 16 rows, in the tile that begins `jump` bytes behind this one.
  static inline __attribute__((always_inline)) BlockScales kept(const MatmulArgs& a, int64_t jump,
                                                                int64_t block, int64_t row) {
    const auto* const words = static_cast<const char*>(a.scale) + jump;
    return {words + (block * Of::kWords * a.rows + row) * kUnitBytes,
            a.halves + jump + (block * Of::kHalves * a.rows + row) * 2, a.rows,
            first_lanes(min(a.rows - row, kLanes))};
  }

  // Groups [begin, end) of a block. What blocks keep is a second stream from memory beside the
  // codes. It is prefetched kAhead blocks before it is used, one line at a time: a core has too few
  // misses in flight at once to make up for a time in which it asks for nothing.
  static inline __attribute__((always_inline)) void load_groups(const MatmulArgs& a, int64_t block,
                                                                int begin, int end, float* out) {
    constexpr int64_t kAhead = kBlockWeights / Of::kWeights;
    int64_t later = block + kAhead;
    int64_t jump = 0;
    if (const int64_t blocks = a.k / Of::kWeights; later >= blocks) {
      later = a.next == nullptr ? block : later - blocks;
      jump = a.next == nullptr ? 0 : a.next - a.tile;  // The next tile is laid out as this one.
    }
    for (int64_t row = 0; row < a.rows; row += kLanes) {
      const BlockScales prefetched = kept(a, jump, later, row);
      const Of of(kept(a, 0, block, row));
      const int64_t lanes = min(a.rows - row, kLanes);
      float* to = out + row;
#pragma GCC unroll 16
      for (int j = begin; j < end; ++j, to += (1 + Of::kLow) * kTileRows) {
        prefetched.prefetch(j, kGroupsInBlock, Of::kWords, Of::kHalves);
        F32x16 scale, low{};
        of.group(j, scale, low);
        store_some(to, scale, lanes);
        if constexpr (Of::kLow) store_some(to + kTileRows, low, lanes);
      }
    }
  }
};

template <class Of, class C>
using ScalesOfBlocks = ScalesOf<Of, kBlockSteps * C::Math::kStepWeights>;
template <class Of, class C>
struct InBlocks : C, ScalesOfBlocks<Of, C> {
  static constexpr int kBlockWords = Of::kWords;
  static constexpr int kUnitsInBlock = Of::kWeights / C::kUnitWeights;
};
template <class Of, class C>
  requires(Of::kLow)
struct InBlocks<Of, C> : C, ScalesOfBlocks<Of, C> {
  static constexpr bool kZeroPoints = true;
};

}  // namespace lk::LK_ISA

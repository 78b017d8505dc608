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
};

// Scales and minimums of blocks, by what one block keeps for 16 rows: Of. It is made once for all
// groups that are loaded at once, because most of the time goes into its conversions. Of::kWeights
// is the size of a block, Of::kGroup of a group, and Of::kWords and Of::kHalves count what the
// block keeps. Groups are loaded at once if they are of the same block and are unpacked at once,
// kWeights weights long.
//
// What is loaded for a group is [kTileRows] scales, and as many minimums if Of::kLow.
template <class Of, int64_t kWeights>
struct ScalesOf {
  static constexpr int kGroupsInBlock = Of::kWeights / Of::kGroup;
  static constexpr int kGroupsAtOnce = min(Of::kWeights, kWeights) / Of::kGroup;

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
  // Groups [begin, end) of a block. The next block's words are prefetched, a share for each group,
  // or its halves if there are no words: they are a second stream from memory beside the codes.
  static inline __attribute__((always_inline)) void load_groups(const MatmulArgs& a, int64_t block,
                                                                int begin, int end, float* out) {
    constexpr int64_t kBytes = Of::kWords != 0 ? Of::kWords * kUnitBytes : Of::kHalves * 2;
    const int64_t bytes = kBytes * a.rows;
    const char* const stream = Of::kWords != 0 ? static_cast<const char*>(a.scale) : a.halves;
    const char* const next = stream + (block + 1) * bytes;
    for (int64_t at = begin * bytes / kGroupsInBlock; at < end * bytes / kGroupsInBlock; at += 64) {
      __builtin_prefetch(next + at);
    }
    const char* const words =
        static_cast<const char*>(a.scale) + block * Of::kWords * a.rows * kUnitBytes;
    const char* const halves = a.halves + block * Of::kHalves * a.rows * 2;
    for (int64_t row = 0; row < a.rows; row += kLanes) {
      const int64_t lanes = min(a.rows - row, kLanes);
      const Of of(
          BlockScales{words + row * kUnitBytes, halves + row * 2, a.rows, first_lanes(lanes)});
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

// What both ways to multiply a tile, few_tokens.h and many_tokens.h, have in common.
//
// K is cut into segments: runs with one set of scales. The products of a segment are summed, and at
// its end the sums are scaled and added to the totals, which run over all of K.
#pragma once

#include "lk/kernels/format_traits.h"
#include "lk/kernels/packed_activations.h"
#include "lk/kernels/scales.h"

namespace lk::LK_ISA {

// The length of a block in units.
template <class F>
constexpr int64_t kBlockUnits = kBlockSteps / kSteps<F>;

// A run of K, in units, with one set of scales, of weights and of activations. No segment is longer
// than a block.
struct Segment {
  int64_t begin = 0;
  int64_t end = 0;
  const float* scale = nullptr;  // [kTileRows]
  const float* low = nullptr;    // [kTileRows], for formats with zero points
};

// Where the words of a unit are, in a tile of `rows` rows, for a pointer to its first word of row
// `row`.
struct UnitPlace {
  int64_t word_stride;
  int64_t half;                  // to the two bytes of the same row
  const char* shared = nullptr;  // the first word that units share, of the same row
};
template <class F>
UnitPlace unit_place(const MatmulArgs& a, int64_t row) {
  UnitPlace place{a.rows * kUnitBytes, kWords<F> * a.rows * kUnitBytes - row * (kUnitBytes - 2)};
  if constexpr (kSharedBits<F> != 0) {
    place.shared = static_cast<const char*>(a.scale) + row * kUnitBytes;
  }
  return place;
}

// The words of unit `index` of each of 16 rows of a format of blocks. `vector` counts vectors of
// rows from `unit` on.
template <class F>
inline __attribute__((always_inline)) void load_words(const char* unit, UnitPlace place,
                                                      int64_t index, int64_t vector, LaneMask lanes,
                                                      U32x16* words) {
#pragma GCC unroll 8
  for (int i = 0; i < kWords<F>; ++i) {
    words[i] = load_units(unit + i * place.word_stride + vector * 64, lanes);
  }
  if constexpr (kHalfWord<F>) {
    words[kWords<F>] = load_half_units(unit + place.half + vector * 32, lanes);
  }
  if constexpr (kSharedBits<F> != 0) {
    const int64_t bit = index % F::kUnitsInBlock * kSharedBits<F>;
    const int64_t word = index / F::kUnitsInBlock * F::kBlockWords + bit / 32;
    words[kUnitVectors<F>] =
        load_units(place.shared + word * place.word_stride + vector * 64, lanes) >>
        static_cast<int>(bit % 32);
  }
}
template <class F>
constexpr int kLoadedWords = kUnitVectors<F> + (kSharedBits<F> != 0);

// Unpacks unit `index` of each of 16 rows.
template <class F>
inline __attribute__((always_inline)) void unpack_unit(const char* unit, UnitPlace place,
                                                       int64_t index, int64_t vector,
                                                       LaneMask lanes,
                                                       typename F::Math::Weights* w) {
  if constexpr (kOwnScales<F>) {
    U32x16 words[kLoadedWords<F>];
    load_words<F>(unit, place, index, vector, lanes, words);
    F::unpack(words, w);
  } else {
    F::unpack(load_units(unit + vector * 64, lanes), w);
  }
}
// Unpacks that unit of two vectors of rows, for a format with kTogether<F>.
template <class F>
inline __attribute__((always_inline)) void unpack_two(
    const char* unit, UnitPlace place, int64_t index, int64_t vector, const LaneMask (&lanes)[2],
    typename F::Math::Weights (&w)[2][kSteps<F>]) {
  U32x16 words[2][kLoadedWords<F>];
  for (int v = 0; v < 2; ++v) load_words<F>(unit, place, index, vector + v, lanes[v], words[v]);
  F::unpack_two(words[0], words[1], w[0], w[1]);
}

// The scales of a group of weights, [kTileRows], followed for formats with zero points by what all
// its weights are lower by. Groups are loaded in their order, those of blocks F::kGroupsAtOnce at a
// time.
template <class F>
constexpr int64_t kScaleRows = (1 + kZeroPoints<F>)*kTileRows;
template <class F>
void load_group(const MatmulArgs& a, int64_t group, float* out) {
  if constexpr (kOwnScales<F>) {
    if (group % kGroupsAtOnce<F> == 0) F::load_scales(a, group, out);
  } else {
    load_scales(a, group, out);
    if constexpr (kZeroPoints<F>) load_zero_points(a, group, out, out + kTileRows);
  }
}

// Where the segment ends that begins at the unit `begin`; `units` is the end of K.
template <class F>
int64_t segment_end(const MatmulArgs& a, int64_t begin, int64_t units) {
  int64_t end = begin + kBlockUnits<F>;
  if constexpr (kQuantisedActs<F>) {
    end = begin + (int64_t{1} << a.act_block_log2) / F::kUnitWeights;
  } else if (a.group != 0) {
    const int64_t length = a.group / F::kUnitWeights;
    const int64_t group_end = (begin / length + 1) * length;
    end = end < group_end ? end : group_end;
  }
  return end < units ? end : units;
}

// The group of weights that a unit belongs to.
template <class F>
int64_t scale_group(const MatmulArgs& a, int64_t unit) {
  return a.group == 0 ? 0 : unit * F::kUnitWeights / a.group;
}

// Where a packed row keeps what belongs to the block of activations of a unit, in bytes.
template <class F>
int64_t block_info_offset(int64_t unit, int64_t k, int block_log2) {
  return F::Math::block_info_offset(k, unit * F::kUnitWeights >> block_log2);
}

// The sums over all of K so far of R vectors of rows times T tokens. They are in MatmulArgs::out,
// or, with kInRegisters, in registers beside the sums of a segment. That saves most of what the end
// of a segment costs, a load and a store of each total.
template <int R, int T, bool kInRegisters>
struct Totals {
  F32x16 kept[kInRegisters ? R : 1][kInRegisters ? T : 1];
};
template <int R, int T, bool kInRegisters>
inline __attribute__((always_inline)) void load_totals(Totals<R, T, kInRegisters>& totals,
                                                       const float* out) {
  if constexpr (kInRegisters) {
#pragma GCC unroll 32
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) totals.kept[r][t] = load(out + t * kTileRows + r * kLanes);
    }
  }
}
template <int R, int T, bool kInRegisters>
inline __attribute__((always_inline)) void store_totals(const Totals<R, T, kInRegisters>& totals,
                                                        float* out) {
  if constexpr (kInRegisters) {
#pragma GCC unroll 32
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) store(out + t * kTileRows + r * kLanes, totals.kept[r][t]);
    }
  }
}

// total + scale * sum - low * sum of the segment's activations, for one token and 16 rows.
template <class F>
inline __attribute__((always_inline)) F32x16 add_scaled(F32x16 total, typename F::Math::Sum sum,
                                                        float act_scale, F32x16 minus_act_sum,
                                                        F32x16 scale, F32x16 low) {
  if constexpr (!kGroupScales<F>) {
    return F::Math::add(sum, act_scale, total);
  } else {
    total = fma(F::Math::value(sum, act_scale), scale, total);
    if constexpr (kZeroPoints<F>) total = fma(low, minus_act_sum, total);
    return total;
  }
}

// What add_scaled multiplies `low` with.
template <class F>
inline __attribute__((always_inline)) F32x16 minus_act_sum(const char* acts, int64_t begin,
                                                           int64_t end, int64_t k, int block_log2) {
  if constexpr (!kZeroPoints<F>) return zeros();
  return broadcast(
      -act_sum<F>(acts, begin * F::kUnitWeights, end * F::kUnitWeights, k, block_log2));
}

// Ends a segment: totals += scale * sum - low * sum of the segment's activations, for the rows from
// `row` on.
template <class F, bool kInRegisters, int R, int T>
inline __attribute__((always_inline)) void add_segment(const Segment& s, int64_t k, int block_log2,
                                                       typename F::Math::Sum (&sum)[R][T],
                                                       int64_t row, const char* const* acts,
                                                       Totals<R, T, kInRegisters>& totals,
                                                       float* out) {
  using Math = typename F::Math;
  const int64_t block_info = block_info_offset<F>(s.begin, k, block_log2);
  const float* scale = s.scale + row;
  const float* low = s.low + row;
#pragma GCC unroll 32
  for (int t = 0; t < T; ++t) {
    const float act_scale = Math::scale(acts[t] + block_info);
    const F32x16 minus = minus_act_sum<F>(acts[t], s.begin, s.end, k, block_log2);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      float* at = out + t * kTileRows + r * kLanes;
      F32x16 total, scale_of_row{}, low_of_row{};
      if constexpr (kInRegisters) {
        total = totals.kept[r][t];
      } else {
        total = load(at);
      }
      if constexpr (kGroupScales<F>) scale_of_row = load(scale + r * kLanes);
      if constexpr (kZeroPoints<F>) low_of_row = load(low + r * kLanes);
      total = add_scaled<F>(total, sum[r][t], act_scale, minus, scale_of_row, low_of_row);
      if constexpr (kInRegisters) {
        totals.kept[r][t] = total;
      } else {
        store(at, total);
      }
    }
  }
}

// Where the bytes of a row are no multiple of a unit, the rest of all rows lies at the end of the
// tile, row after row. This puts it into `unit`, padded with zeros, in the order of other units.
inline void pad_last_unit(const MatmulArgs& a, char* unit) {
  const int64_t rest = a.row_bytes % kUnitBytes;
  const char* from = a.tile + a.rows * (a.row_bytes - rest);
  std::memset(unit, 0, kTileRows * kUnitBytes);
  for (int64_t r = 0; r < a.rows; ++r) std::memcpy(unit + r * kUnitBytes, from + r * rest, rest);
}

// Calls f.template operator()<T>() with T = tokens, which is kLeast to kMost.
template <int kLeast, int kMost, class Function>
inline __attribute__((always_inline)) void with_constant_tokens(int64_t tokens, Function&& f) {
  if constexpr (kMost > kLeast) {
    if (tokens < kMost) return with_constant_tokens<kLeast, kMost - 1>(tokens, f);
  }
  f.template operator()<kMost>();
}

}  // namespace lk::LK_ISA

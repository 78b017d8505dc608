// Multiplies a tile with few tokens: weights are unpacked on their way from memory, which is what
// limits the speed.
#pragma once

#include "lk/kernels/arithmetic.h"
#include "lk/kernels/segments.h"

namespace lk::LK_ISA {

// How many bytes before their use weights are prefetched, and into which cache; the hardware's own
// prefetcher alone stops at every page. On Zen 5, 8 KiB into L1 take 1 to 15% less time than 4 or
// 16 KiB where memory is the limit. On a Xeon with AMX, where a line on its way into L1 keeps one
// of 16 fill buffers until it has come, 4 KiB into L2 take 20 to 27% less time than that in the
// 4-bit formats, and 3% less in int8.
//
// Formats of blocks have units of several words, and read each unit's lines in turns of its words.
// The hardware does not foresee that order, so all lines come from memory as they are prefetched,
// and into L1 a core of Zen 4 has 24 on their way, which is 15 GB/s. Into L2, Q4_K and Q6_K take
// 0.77 of the time at 1 token there (AVX2: 0.83), and Q5_0 0.66. Lines of one stream, which the
// hardware has brought into L2 by then, take 5 to 10% longer so (fp8, int8).
#if defined(__AMX_TILE__)
constexpr int64_t kPrefetchBytes = 4096;
template <class F>
constexpr int kPrefetchInto = 2;  // __builtin_prefetch's locality: L2
#else
constexpr int64_t kPrefetchBytes = 8192;
template <class F>
constexpr int kPrefetchInto = kOwnScales<F> ? 2 : 3;  // L2 or L1
#endif

// What is prefetched while a unit is multiplied: the weights that few_tokens reads kPrefetchBytes
// later, one line for each line that is loaded. Four prefetches at once, before the loads, fill the
// queue of misses and stop the loads, which took 2 to 4% more time at 1 token. Longer bursts are
// worse.
struct Prefetch {
  const char* line = nullptr;
  const char* end = nullptr;  // of the tile; `jump` is added to what lies behind it
  int64_t jump = 0;
  // A part of the next tile, prefetched into L2 only, because all passes over this tile come before
  // it is read. Null: none.
  const char* next_tile = nullptr;
  int64_t next_tile_stride = 0;  // bytes for each unit, at most two lines
};

// The part of the next tile that one pass prefetches, so that memory is read while several passes
// of tokens go over a tile that is in L2.
struct NextTilePart {
  const char* begin = nullptr;
  int64_t stride = 0;  // bytes for each unit of this tile
};

// sum[r][t] += `units` units, from `first_unit` on, of R vectors of rows times T tokens'
// activations. Units of weights are `stride` bytes apart, and their words as `place` says. Only a
// single vector (R is 1) may have fewer than 16 rows.
template <class F, int R, int T>
inline __attribute__((always_inline)) void multiply(typename F::Math::Sum (&sum)[R][T],
                                                    const char* weights, int64_t stride,
                                                    UnitPlace place, int64_t first_unit,
                                                    int64_t units, LaneMask rows,
                                                    const char* const* acts, int64_t act_offset,
                                                    Prefetch prefetch) {
  using Math = typename F::Math;
  constexpr int kStepBytes = Math::kStepWeights * Math::kActBytes;
  const char* act[T];
#pragma GCC unroll 32
  for (int t = 0; t < T; ++t) act[t] = acts[t] + act_offset;
  const LaneMask lanes = R == 1 ? rows : first_lanes(kLanes);
  for (int64_t u = 0; u < units; ++u, weights += stride) {
    const char* const later =
        prefetch.line < prefetch.end ? prefetch.line : prefetch.line + prefetch.jump;
    prefetch.line += stride;
    if (prefetch.next_tile != nullptr) {
      __builtin_prefetch(prefetch.next_tile, 0, 2);
      if (prefetch.next_tile_stride > 64) __builtin_prefetch(prefetch.next_tile + 64, 0, 2);
      prefetch.next_tile += prefetch.next_tile_stride;
    }
    const int64_t offset = u * kSteps<F> * kStepBytes;
    if constexpr (kSteps<F> == 1) {
      typename Math::Weights w[R];
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(later + r * 64, 0, kPrefetchInto<F>);
        unpack_unit<F>(weights, place, first_unit + u, r, lanes, &w[r]);
      }
#pragma GCC unroll 32
      for (int t = 0; t < T; ++t) {
        const auto a = Math::act(act[t] + offset);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) sum[r][t] = Math::multiply_add(sum[r][t], w[r], a);
      }
    } else {
      // Two vectors of rows share a load of activations, if their weights leave enough registers.
      constexpr int kShare = R % 2 == 0 && kSteps<F> <= 4 && kVectors == 1 ? 2 : 1;
#pragma GCC unroll 32
      for (int first = 0; first < R; first += kShare) {
        typename Math::Weights w[kShare][kSteps<F>];
#pragma GCC unroll 32
        for (int r = 0; r < kShare; ++r) {
#pragma GCC unroll 8
          for (int i = 0; i < kWords<F>; ++i) {
            __builtin_prefetch(later + i * place.word_stride + (first + r) * 64, 0,
                               kPrefetchInto<F>);
          }
          if (kHalfWord<F> && (first + r) % 2 == 0) {
            __builtin_prefetch(later + place.half + (first + r) * 32, 0, kPrefetchInto<F>);
          }
          if constexpr (!kTogether<F> || kShare == 1) {
            unpack_unit<F>(weights, place, first_unit + u, first + r, lanes, w[r]);
          }
        }
        if constexpr (kTogether<F> && kShare == 2) {
          unpack_two<F>(weights, place, first_unit + u, first, {lanes, lanes}, w);
        }
#pragma GCC unroll 32
        for (int step = 0; step < kSteps<F>; ++step) {
#pragma GCC unroll 32
          for (int t = 0; t < T; ++t) {
            const char* from = act[t] + offset + step * kStepBytes;
            if constexpr (kShare == 1) {
              sum[first][t] = Math::multiply_add(sum[first][t], w[0][step], from);
            } else {
              const auto a = Math::act(from);
#pragma GCC unroll 32
              for (int r = 0; r < kShare; ++r) {
                sum[first + r][t] = Math::multiply_add(sum[first + r][t], w[r][step], a);
              }
            }
          }
        }
      }
    }
  }
}

// AVX2 has registers for the sums of one vector of rows times four tokens, or of four vectors times
// one. So a pass over formats whose weights take longer to unpack than to read has four tokens, and
// takes the vectors of rows one after the other, segment by segment: what is unpacked is multiplied
// with all four. With 4 tokens an expert, that takes 0.55 to 0.65 of the time of four passes in
// Q3_K, Q6_K and IQ4_NL on Zen 4, and 0.56 of that of many_tokens in fp8. For int8, which is read
// as fast as memory allows, to read each line of a segment in turns takes 1.3 to 1.9 times as long.
template <class F>
constexpr bool kRowsInTurn =
    kVectors == 2 && (F::kUnitWeights >= 8 || (F::kUnitWeights == 4 && !kQuantisedActs<F>));
constexpr int kTokensInTurn = 4;

// One pass: R vectors of rows from `row` on, times T tokens. `last_unit` is the padded last unit of
// rows that do not end with a whole one, else null.
//
// Everything that is not `noinline` is inlined: GCC 12 would not inline what it finds in so many
// kernels, and a vector of simd.h that is passed through memory costs more than what is done to it.
template <class F, int R, int T>
__attribute__((flatten)) void few_tokens(const MatmulArgs& a, int64_t row, const char* last_unit,
                                         const NextTilePart& next_tile) {
  using Math = typename F::Math;
  const auto* acts = reinterpret_cast<const char* const*>(a.acts);
  // How many vectors of rows are multiplied at a time.
  constexpr int kRows = kRowsInTurn<F> && T > 1 ? 1 : R;
  float* const out = a.out + row;
  const int64_t k = a.k;
  const int block_log2 = a.act_block_log2;
  const int64_t stride = a.rows * kUnitRowBytes<F>;
  const int64_t whole = a.row_bytes / kUnitRowBytes<F>;
  const int64_t units = whole + (last_unit != nullptr);
  const LaneMask lanes = first_lanes(min(a.rows - row, kLanes));
  const char* const tile_end = a.tile + row * kUnitBytes + whole * stride;
  alignas(64) float scales[kGroupsAtOnce<F> * kScaleRows<F>];
  const float* scale = scales;
  // Totals stay in registers where there are enough; with bf16, unpacked weights need them.
  constexpr bool kInRegisters = kQuantisedActs<F> && kVectors == 1 && R * T <= 12;
  Totals<kRows, T, kInRegisters> totals;
  load_totals(totals, out);
  int64_t group = -1;
  int64_t group_end = 0;  // the unit where the loaded scales end
  int64_t end;
  for (int64_t begin = 0; begin < units; begin = end) {
    end = kOneSum<F> ? units : segment_end<F>(a, begin, units);
    if (kGroupScales<F> && begin >= group_end) {
      ++group;
      load_group<F>(a, group, scales);
      scale = scales + group % kGroupsAtOnce<F> * kScaleRows<F>;
      group_end = a.group == 0 ? units : group_end + a.group / F::kUnitWeights;
    }
    const int64_t whole_end = end < whole ? end : whole;
#pragma GCC unroll 1
    for (int first = 0; first < R; first += kRows) {
      const int64_t from = row + first * kLanes;
      typename Math::Sum sum[kRows][T];
#pragma GCC unroll 32
      for (int t = 0; t < T; ++t) {
        const auto start = Math::begin(acts[t] + block_info_offset<F>(begin, k, block_log2));
#pragma GCC unroll 32
        for (int r = 0; r < kRows; ++r) sum[r][t] = Math::copy(start);
      }
      const char* const units_begin = a.tile + from * kUnitBytes + begin * stride;
      Prefetch prefetch{units_begin + kPrefetchBytes, tile_end, -kPrefetchBytes};
      if (a.next) prefetch.jump = a.next + row * kUnitBytes - tile_end;
      if (next_tile.begin && from == 0) {
        prefetch.next_tile = next_tile.begin + begin * next_tile.stride;
        prefetch.next_tile_stride = next_tile.stride;
      }
      multiply<F, kRows, T>(sum, units_begin, stride, unit_place<F>(a, from), begin,
                            whole_end - begin, R == 1 ? lanes : first_lanes(kLanes), acts,
                            begin * F::kUnitWeights * Math::kActBytes, prefetch);
      // Rows of blocks end with a whole unit.
      if constexpr (!kOwnScales<F>) {
        if (end > whole) {
          const char* const unit = last_unit + from * kUnitBytes;
          multiply<F, kRows, T>(sum, unit, 0, {}, whole, 1, first_lanes(kLanes), acts,
                                whole * F::kUnitWeights * Math::kActBytes, {unit, unit + 1});
        }
      }
      add_segment<F, kInRegisters>(
          {.begin = begin, .end = end, .scale = scale, .low = scale + kTileRows}, k, block_log2,
          sum, from, acts, totals, a.out + from);
    }
  }
  store_totals(totals, out);
}

}  // namespace lk::LK_ISA

// Multiplies a tile with many tokens: a block of weights is unpacked into L1, and all tokens pass
// over it before the next block is unpacked.
#pragma once

#include <type_traits>

#include "lk/kernels/arithmetic.h"
#include "lk/kernels/segments.h"

namespace lk::LK_ISA {

// The most segments in a block: no group of weights and no block of activations is shorter than 4
// steps, which is 16 weights as bytes.
constexpr int kMostSegments = 16;

// Weights with one step a unit, and those that an instruction a vector unpacks (F::kQuickUnpack),
// are unpacked when they are multiplied, except by AMX, which multiplies memory.
template <class F>
constexpr bool kUnpackLate = (kSteps<F> == 1 || kQuickUnpack<F>) && !kAmx<F>;
// Steps that lie in a vector of a block.
template <class F>
constexpr int kVectorSteps = kUnpackLate<F> ? kSteps<F> : 1;

// Unpacked weights of some whole segments.
struct Block {
  const char* weights = nullptr;
  const Segment* segments = nullptr;
  int count = 0;  // of segments
  int64_t k = 0;
  int act_block_log2 = kActBlockLog2;
  // What a call of block_times_tokens prefetches meanwhile: `lines` cache lines for each run of
  // kRun steps, and with `further` also those that lie kFurtherBytes behind them, into L2.
  const char* next = nullptr;
  int64_t lines = 0;
  bool further = false;
};
constexpr int64_t kRun = 8;
// Into L1, a core of Zen 4 has 24 lines on their way, which is 15 GB/s. With bf16 on AVX2, one or
// two passes over a block take less time than that. With 64 and 128 tokens, Qwen3-30B's layer takes
// 0.92 to 0.97 of the time with the lines this far behind in L2 by then, and 4 KiB are as good.
// With AVX-512 it makes no difference, or takes 1.04 times as long.
constexpr int64_t kFurtherBytes = 8192;

// What a format is once its weights are unpacked. Most of those whose weights are integers with
// group scales have this in common then, as formats of blocks have in every arithmetic, and so they
// share the code that multiplies.
template <class Products>
struct UnpackedGroups {
  using Math = Products;
  static constexpr int kUnitWeights = 8;
  static void load_scales();  // never called: kOwnScales
};
template <class Products>
struct UnpackedGroupsWithMinimums : UnpackedGroups<Products> {
  static constexpr bool kZeroPoints = true;
};
template <class F>
struct UnpackedOf {
  using Type = F;
};
template <class F>
  requires kOwnScales<F> || (kQuantisedActs<F> && kGroupScales<F> && F::kUnitWeights == 8)
struct UnpackedOf<F> {
  using Products = typename F::Math::Products;
  using Type = std::conditional_t<kZeroPoints<F>, UnpackedGroupsWithMinimums<Products>,
                                  UnpackedGroups<Products>>;
};
template <class F>
using Unpacked = typename UnpackedOf<F>::Type;

// The steps of R vectors of a block times T tokens.
template <class F, int R, int T>
inline __attribute__((always_inline)) void multiply_vectors(typename F::Math::Sum (&sum)[R][T],
                                                            const char* weights,
                                                            const char* const (&act)[T],
                                                            int64_t offset) {
  using Math = typename F::Math;
#pragma GCC unroll 32
  for (int step = 0; step < kVectorSteps<F>; ++step) {
    // GCC 12 would unpack all steps of a vector first, for which it has no registers, so it must
    // not know that they come from the same memory.
    if (step > 0) asm("" : "+r"(weights));
    typename Math::Weights w[R];
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      // With kUnpackLate, the block holds weights as the tile does, so that no copy is needed (see
      // many_tokens).
      if constexpr (kUnpackLate<F>) {
        typename Math::Weights all[kSteps<F>];
        F::unpack(load_units(weights + r * 64, first_lanes(kLanes)), all);
        w[r] = all[step];
      } else {
        w[r] = *reinterpret_cast<const typename Math::Weights*>(weights + r * 64);
      }
    }
#pragma GCC unroll 32
    for (int t = 0; t < T; ++t) {
      const auto a = Math::act(act[t] + offset + step * Math::kStepWeights * Math::kActBytes);
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) sum[r][t] = Math::multiply_add(sum[r][t], w[r], a);
    }
  }
}

// R vectors of a block's rows from `row` on, times T tokens.
template <class F, bool kInRegisters, int R, int T>
__attribute__((noinline)) void block_times_tokens(const Block& block, int64_t row,
                                                  const char* const* acts, float* out) {
  using Math = typename F::Math;
  using Sum = typename Math::Sum;
  // Of activations and of weights, from one vector to the next.
  constexpr int64_t kActStride = kVectorSteps<F> * Math::kStepWeights * Math::kActBytes;
  constexpr int64_t kStride = kTileRows * kUnitBytes;
  const int64_t k = block.k;
  const int block_log2 = block.act_block_log2;
  const char* weights = block.weights + row * kUnitBytes;
  const char* next = block.next;
  int64_t offset = block.segments[0].begin * F::kUnitWeights * Math::kActBytes;
  const char* act[T];
#pragma GCC unroll 32
  for (int t = 0; t < T; ++t) act[t] = acts[t];
  Totals<R, T, kInRegisters> totals;
  load_totals(totals, out);
  for (int i = 0; i < block.count; ++i) {
    const Segment& s = block.segments[i];
    Sum sum[R][T];
#pragma GCC unroll 32
    for (int t = 0; t < T; ++t) {
      if constexpr (kOneSum<F>) {
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) sum[r][t] = load(out + t * kTileRows + r * kLanes);
      } else {
        const Sum start = Math::begin(act[t] + block_info_offset<F>(s.begin, k, block_log2));
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) sum[r][t] = Math::copy(start);
      }
    }
    constexpr int64_t kRunVectors = kRun / kVectorSteps<F>;
    int64_t vectors = (s.end - s.begin) * kSteps<F> / kVectorSteps<F>;
    for (; vectors >= kRunVectors; vectors -= kRunVectors) {
      for (int64_t line = 0; line < block.lines; ++line) {
        __builtin_prefetch(next + line * 64);
        if (block.further) __builtin_prefetch(next + kFurtherBytes + line * 64, 0, 2);
      }
      next += block.lines * 64;
      const char* from[T];
#pragma GCC unroll 32
      for (int t = 0; t < T; ++t) from[t] = act[t] + offset;
#pragma GCC unroll 32
      for (int64_t i = 0; i < kRunVectors; ++i) {
        multiply_vectors<F, R, T>(sum, weights + i * kStride, from, i * kActStride);
      }
      weights += kRunVectors * kStride;
      offset += kRunVectors * kActStride;
    }
#pragma GCC unroll 1
    for (; vectors > 0; --vectors) {
      multiply_vectors<F, R, T>(sum, weights, act, offset);
      weights += kStride;
      offset += kActStride;
    }
    if constexpr (kOneSum<F>) {
#pragma GCC unroll 32
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) store(out + t * kTileRows + r * kLanes, sum[r][t]);
      }
    } else {
      add_segment<F, kInRegisters>(s, k, block_log2, sum, row, act, totals, out);
    }
  }
  store_totals(totals, out);
}

// Puts units [u0, u1) into `out` in the form that is multiplied: unpacked, unless kUnpackLate, and
// with all kTileRows rows. `last_unit` is the padded last unit, or null.
template <class F>
__attribute__((noinline)) void unpack_block(const MatmulArgs& a, int64_t u0, int64_t u1,
                                            const char* last_unit, char* out) {
  constexpr int kAtOnce = kTogether<F> ? 2 : 1;
  const int64_t whole = a.row_bytes / kUnitRowBytes<F>;
  const UnitPlace place = unit_place<F>(a, 0);
  LaneMask lanes[kTileRows / kLanes];
  for (int64_t v = 0; v < kTileRows / kLanes; ++v) {
    lanes[v] = first_lanes(min(max(a.rows - v * kLanes, 0), kLanes));
  }
  for (int64_t u = u0; u < u1; ++u, out += kSteps<F> / kVectorSteps<F> * kTileRows * kUnitBytes) {
    const char* from = u < whole ? a.tile + u * a.rows * kUnitRowBytes<F> : last_unit;
    const auto present = [&](int64_t v) { return u < whole ? lanes[v] : first_lanes(kLanes); };
    for (int64_t v = 0; v < kTileRows / kLanes; v += kAtOnce) {
      if constexpr (kUnpackLate<F>) {
        const U32x16 units = load_units(from + v * 64, present(v));
        std::memcpy(out + v * 64, &units, sizeof(units));
      } else {
        typename F::Math::Weights w[kAtOnce][kSteps<F>];
        if constexpr (kAtOnce == 2) {
          unpack_two<F>(from, place, u, v, {present(v), present(v + 1)}, w);
        } else {
          unpack_unit<F>(from, place, u, v, present(v), w[0]);
        }
#pragma GCC unroll 2
        for (int r = 0; r < kAtOnce; ++r) {
#pragma GCC unroll 32
          for (int step = 0; step < kSteps<F>; ++step) {
            if constexpr (kAmx<F>) w[r][step] = F::Math::for_tiles(w[r][step]);
            std::memcpy(out + step * kTileRows * kUnitBytes + (v + r) * 64, &w[r][step], 64);
          }
        }
      }
    }
  }
}

// Lists as many segments from unit u0 on as fit into a block of at most `most` units, in the units
// of unpacked weights. Their scales and zero points are turned into floats in `rows`. Returns the
// end of the last segment.
template <class F>
__attribute__((noinline)) int64_t list_segments(const MatmulArgs& a, int64_t u0, int64_t units,
                                                int64_t most, float* rows, Segment* segments,
                                                int* count) {
  *count = 0;
  for (int64_t begin = u0; begin < units;) {
    const int64_t end = kOneSum<F> ? min(begin + most, units) : segment_end<F>(a, begin, units);
    if (end - u0 > most) return begin;
    Segment& s = segments[(*count)++];
    constexpr int64_t kUnits = F::kUnitWeights / Unpacked<F>::kUnitWeights;
    s = {begin * kUnits, end * kUnits};
    if constexpr (kGroupScales<F>) {
      const int64_t group = scale_group<F>(a, begin);
      const bool same = begin != u0 && group == scale_group<F>(a, begin - 1);
      s.scale = same ? (&s)[-1].scale : rows;
      s.low = s.scale + kTileRows;
      if (!same) {
        load_group<F>(a, group, rows);
        rows += kScaleRows<F>;
      }
    }
    begin = end;
  }
  return units;
}

// A block times all tokens, R vectors of rows and at most T tokens at a time. Passes are of equal
// size, and none has fewer than kLeast tokens. Meanwhile `next` is prefetched, `lines` cache lines
// for each run of kRun steps; null: nothing.
template <class F, bool kInRegisters, int R, int kLeast, int T>
__attribute__((noinline)) void block_times_all(const MatmulArgs& a, Block block, const char* next,
                                               int64_t lines) {
  const auto* acts = reinterpret_cast<const char* const*>(a.acts);
  const int64_t passes = (a.tokens + T - 1) / T;
  // While the first tokens pass over a block, the next block is prefetched from memory, at a pace
  // that does not fill the queue of misses; while the last tokens do, from L2 into L1.
  const int64_t shares = passes > 4 ? 4 : passes > 2 ? 2 : 1;
  const int64_t steps = (block.segments[block.count - 1].end - block.segments[0].begin) * kSteps<F>;
  block.next = next;
  block.further = kQuickUnpack<F> && passes <= 2;
  int64_t done = 0;
  for (int64_t i = 0; i < passes; ++i) {
    const int64_t tokens = (a.tokens - done + passes - i - 1) / (passes - i);
    const bool last = i == passes - 1;
    if (last) block.next = next;
    block.lines = next && (i < shares || last) ? lines / (last ? 1 : shares) : 0;
    with_constant_tokens<kLeast, T>(tokens, [&]<int kTokens>() {
      for (int64_t row = 0; row < kTileRows; row += R * kLanes) {
        const int64_t at = done * kTileRows + row;
        block_times_tokens<F, kInRegisters, R, kTokens>(block, row, acts + done, a.out + at);
        block.next += block.lines * (steps / kRun) * 64;
      }
    });
    done += tokens;
  }
}

// All tokens, as in block_times_all.
template <class F, bool kInRegisters, int R, int kLeast, int T>
void many_tokens(const MatmulArgs& a, const char* last_unit) {
  const int64_t whole = a.row_bytes / kUnitRowBytes<F>;
  const int64_t units = whole + (last_unit != nullptr);
  const bool in_place = kUnpackLate<F> && a.rows == kTileRows;
  // Weights that are multiplied where they are need not fit into the scratch memory. With bf16,
  // many passes over longer blocks, which lie in L2, take 0.95 (AVX2) and 0.98 (AVX-512) of the
  // time, as there are fewer calls.
  const int64_t longest =
      in_place && kOneSum<F> && a.tokens > 4 * T ? 4 * kBlockUnits<F> : kBlockUnits<F>;
  const int64_t unit_bytes = a.rows * kUnitRowBytes<F>;
  auto* const rows = reinterpret_cast<float*>(a.scratch + kUnpackedBytes);
  constexpr int64_t kLines = kRun * R * kUnitRowBytes<F> / (kSteps<F> * kUnitBytes);
  Segment segments[kMostSegments];
  int64_t u1;
  for (int64_t u0 = 0; u0 < units; u0 = u1) {
    Block block{
        .weights = a.scratch, .segments = segments, .k = a.k, .act_block_log2 = a.act_block_log2};
    const int64_t most = whole - u0 < longest ? kBlockUnits<F> : longest;
    u1 = list_segments<F>(a, u0, units, most, rows, segments, &block.count);
    if (in_place && u1 <= whole) {
      block.weights = a.tile + u0 * unit_bytes;
    } else {
      unpack_block<F>(a, u0, u1, last_unit, a.scratch);
    }
    const char* const next = u1 < whole ? a.tile + u1 * unit_bytes : a.next;
    block_times_all<Unpacked<F>, kInRegisters, R, kLeast, T>(a, block, next, kLines);
  }
}

}  // namespace lk::LK_ISA

// Rows of a tile times tokens, for any format.
//
// A format F names its arithmetic (F::Math), how many weights along K four bytes hold (F::kUnit),
// in which order it unpacks them (F::kOrder) and unpack(): 16 rows' units to F::kUnit /
// Math::kWidth vectors, one a step. All else about a format is in the arguments: which scales, over
// which groups.
#pragma once

#include <algorithm>
#include <type_traits>

#include "lk/arithmetic.h"
#include "lk/scales.h"

namespace lk::LK_ISA {

// How far ahead of their use weights are asked for; the hardware's own prefetcher alone stops at
// every page. On Zen 5, 8 KiB takes 1 to 15% less time than 4 or 16 KiB where memory is the limit.
constexpr int64_t kPrefetchBytes = 8192;
constexpr int64_t kBlockSteps = kUnpackedBytes / (kTileRows * 4);  // of unpacked weights, in L1

template <class F>
constexpr int kSteps = F::kUnit / F::Math::kWidth;
template <class F>
constexpr bool kZeroPoints = requires { F::kZeroPoints; };
template <class F>
constexpr bool kGroupScales = !requires { F::kNoGroupScales; };

// Formats with zero points need the sum of each block of activations, behind the activations.
template <class F>
int64_t act_row_bytes(int64_t k) {
  const int64_t bytes = F::Math::row_bytes(k);
  return (bytes + (kZeroPoints<F> ? act_blocks(k) * 4 : 0) + 63) / 64 * 64;
}
template <class F>
const float* act_sums(const char* row, int64_t k) {
  return reinterpret_cast<const float*>(row + F::Math::row_bytes(k));
}

template <class F>
void pack(const float* values, int64_t n, int64_t at, int64_t k, int block_log2, void* out) {
  auto* row = static_cast<char*>(out);
  const int log2 = F::Math::kWidth == 4 ? block_log2 : kActBlockLog2;
  const int64_t size = int64_t{1} << log2;
  for (int64_t i = 0; i < n; i += size) {
    const float* from = values + i;
    float padded[int64_t{1} << kMostActBlockLog2] = {};
    if (n - i < size) {
      std::memcpy(padded, from, (n - i) * sizeof(float));
      from = padded;
    }
    const int64_t block = (at + i) >> log2;
    const float sum = F::Math::template pack<F::kOrder>(from, row, block, log2, k);
    if constexpr (kZeroPoints<F>) const_cast<float*>(act_sums<F>(row, k))[block] = sum;
  }
}

// Lines to ask for while a unit is multiplied: what few_tokens reads kPrefetchBytes later. One for
// each line that is loaded: four at once, ahead of the loads, fill the queue of misses and stop
// them, which took 2 to 4% more time at 1 token. A burst of more is worse.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;  // past it jump bytes are added
  int64_t jump = 0;
  // Into L2 only: what is read after all passes over what is here; null: nothing.
  const char* far = nullptr;
  int64_t far_stride = 0;  // at most two lines
};

// sum[r][t] += `units` units of R vectors of rows times T tokens' activations. Weights are `stride`
// bytes a unit apart. Only a single vector may have fewer than 16 rows.
template <class F, int R, int T>
inline __attribute__((always_inline)) void multiply(typename F::Math::Sum (&sum)[R][T],
                                                    const char* weights, int64_t stride,
                                                    int64_t units, LaneMask rows,
                                                    const char* const* acts, int64_t act_offset,
                                                    Ahead ahead) {
  using Math = typename F::Math;
  constexpr int kStepBytes = Math::kWidth * Math::kActBytes;
  const char* act[T];
#pragma GCC unroll 32
  for (int t = 0; t < T; ++t) act[t] = acts[t] + act_offset;
  const LaneMask lanes = R == 1 ? rows : first_lanes(kLanes);
  for (int64_t u = 0; u < units; ++u, weights += stride) {
    const char* const asked = ahead.at < ahead.end ? ahead.at : ahead.at + ahead.jump;
    ahead.at += stride;
    if (ahead.far != nullptr) {
      __builtin_prefetch(ahead.far, 0, 2);
      if (ahead.far_stride > 64) __builtin_prefetch(ahead.far + 64, 0, 2);
      ahead.far += ahead.far_stride;
    }
    const int64_t offset = u * kSteps<F> * kStepBytes;
    if constexpr (kSteps<F> == 1) {
      typename Math::Weights w[R];
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(asked + r * 64);
        F::unpack(load_units(weights + r * 64, lanes), &w[r]);
      }
#pragma GCC unroll 32
      for (int t = 0; t < T; ++t) {
        const auto a = Math::act(act[t] + offset);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) sum[r][t] = Math::multiply_add(sum[r][t], w[r], a);
      }
    } else {
      // Two vectors of rows share a load of activations, if their weights leave the registers room.
      constexpr int kTogether = R % 2 == 0 && kSteps<F> <= 4 && kVectors == 1 ? 2 : 1;
#pragma GCC unroll 32
      for (int first = 0; first < R; first += kTogether) {
        typename Math::Weights w[kTogether][kSteps<F>];
#pragma GCC unroll 32
        for (int r = 0; r < kTogether; ++r) {
          __builtin_prefetch(asked + (first + r) * 64);
          F::unpack(load_units(weights + (first + r) * 64, lanes), w[r]);
        }
#pragma GCC unroll 32
        for (int step = 0; step < kSteps<F>; ++step) {
#pragma GCC unroll 32
          for (int t = 0; t < T; ++t) {
            const char* from = act[t] + offset + step * kStepBytes;
            if constexpr (kTogether == 1) {
              sum[first][t] = Math::multiply_add(sum[first][t], w[0][step], from);
            } else {
              const auto a = Math::act(from);
#pragma GCC unroll 32
              for (int r = 0; r < kTogether; ++r) {
                sum[first + r][t] = Math::multiply_add(sum[first + r][t], w[r][step], a);
              }
            }
          }
        }
      }
    }
  }
}

// The sum of a token's activations over [begin, end) of K.
template <class F>
float act_sum(const char* row, int64_t begin, int64_t end, int64_t k, int block_log2) {
  const int log2 = F::Math::kWidth == 4 ? block_log2 : kActBlockLog2;
  const float* sums = act_sums<F>(row, k);
  float total = 0;
  for (int64_t b = begin >> log2; b << log2 < end; ++b) total += sums[b];
  return total;
}

// A run of K with one set of scales, of weights and of activations, in units. None is longer than a
// block of unpacked weights.
struct Segment {
  int64_t begin = 0;
  int64_t end = 0;
  const float* scale = nullptr;  // [kTileRows]
  const float* zero = nullptr;   // [kTileRows], of formats with zero points
};

// Of a block: no group or block of activations is shorter than 8 steps.
constexpr int kMostSegments = 8;
template <class F>
constexpr int64_t kBlockUnits = kBlockSteps / kSteps<F>;

// Where a segment ends that begins at a unit; at `units` at last.
template <class F>
int64_t segment_end(const MatmulArgs& a, int64_t begin, int64_t units) {
  int64_t end = begin + kBlockUnits<F>;
  if constexpr (F::Math::kWidth == 4) {
    end = begin + (int64_t{1} << a.act_block_log2) / F::kUnit;
  } else if (a.group != 0) {
    const int64_t length = a.group / F::kUnit;
    const int64_t group_end = (begin / length + 1) * length;
    end = end < group_end ? end : group_end;
  }
  return end < units ? end : units;
}
template <class F>
int64_t scale_group(const MatmulArgs& a, int64_t unit) {
  return a.group == 0 ? 0 : unit * F::kUnit / a.group;
}
template <class F>
int64_t about(int64_t unit, int64_t k, int block_log2) {
  return F::Math::about(k, unit * F::kUnit >> block_log2);
}

// Whether a sum runs over all of K: there are no scales to begin anew for.
template <class F>
constexpr bool kOneSum = !kGroupScales<F> && F::Math::kWidth != 4;

// The sums over all of K so far: where they belong, or kept in registers beside the sums of a
// segment. That saves most of what a segment's end costs, a load and a store for each sum.
template <int R, int T, bool kKeep>
struct Totals {
  F32x16 kept[kKeep ? R : 1][kKeep ? T : 1];
};
template <int R, int T, bool kKeep>
inline __attribute__((always_inline)) void fetch(Totals<R, T, kKeep>& totals, const float* out) {
  if constexpr (kKeep) {
#pragma GCC unroll 32
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) totals.kept[r][t] = load(out + t * kTileRows + r * kLanes);
    }
  }
}
template <int R, int T, bool kKeep>
inline __attribute__((always_inline)) void put_back(const Totals<R, T, kKeep>& totals, float* out) {
  if constexpr (kKeep) {
#pragma GCC unroll 32
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) store(out + t * kTileRows + r * kLanes, totals.kept[r][t]);
    }
  }
}

// totals += scale * (sum - zero * activations): what a segment ends with.
template <class F, bool kKeep, int R, int T>
inline __attribute__((always_inline)) void apply(const Segment& s, int64_t k, int block_log2,
                                                 typename F::Math::Sum (&sum)[R][T], int64_t row,
                                                 const char* const* acts,
                                                 Totals<R, T, kKeep>& totals, float* out) {
  using Math = typename F::Math;
  const int64_t block = about<F>(s.begin, k, block_log2);
  const float* scale = s.scale + row;
  const float* zero = s.zero + row;
#pragma GCC unroll 32
  for (int t = 0; t < T; ++t) {
    const float act_scale = Math::scale(acts[t] + block);
    F32x16 taken_off = zeros();
    if constexpr (kZeroPoints<F>) {
      taken_off =
          broadcast(-act_sum<F>(acts[t], s.begin * F::kUnit, s.end * F::kUnit, k, block_log2));
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      float* at = out + t * kTileRows + r * kLanes;
      F32x16 total;
      if constexpr (kKeep) {
        total = totals.kept[r][t];
      } else {
        total = load(at);
      }
      if constexpr (!kGroupScales<F>) {
        total = Math::add(sum[r][t], act_scale, total);
      } else {
        F32x16 value = Math::value(sum[r][t], act_scale);
        if constexpr (kZeroPoints<F>) value = fma(load(zero + r * kLanes), taken_off, value);
        total = fma(value, load(scale + r * kLanes), total);
      }
      if constexpr (kKeep) {
        totals.kept[r][t] = total;
      } else {
        store(at, total);
      }
    }
  }
}

// The leftover bytes of all rows as a unit like the others.
inline void load_tail(const MatmulArgs& a, char* unit) {
  const int64_t tail = a.row_bytes % kUnitBytes;
  const char* from = a.tile + a.rows * (a.row_bytes - tail);
  std::memset(unit, 0, kTileRows * kUnitBytes);
  for (int64_t r = 0; r < a.rows; ++r) std::memcpy(unit + r * kUnitBytes, from + r * tail, tail);
}

// The share of the next tile that a pass asks for, so that memory is read while several tokens pass
// over what is in L2.
struct FarShare {
  const char* from = nullptr;
  int64_t stride = 0;  // a unit
};

// Few tokens, R vectors of rows from `row` on: weights are unpacked on their way from memory.
template <class F, int R, int T>
void few_tokens(const MatmulArgs& a, int64_t row, const char* tail, const FarShare& far) {
  using Math = typename F::Math;
  const auto* acts = reinterpret_cast<const char* const*>(a.acts);
  float* const out = a.out + row;
  const int64_t k = a.k;
  const int block_log2 = a.act_block_log2;
  const int64_t stride = a.rows * kUnitBytes;
  const int64_t whole = a.row_bytes / kUnitBytes;
  const int64_t units = whole + (tail != nullptr);
  const char* const weights = a.tile + row * kUnitBytes;
  const LaneMask lanes = first_lanes(std::min(a.rows - row, kLanes));
  Ahead ahead{weights, weights + whole * stride, -kPrefetchBytes};
  if (a.next) ahead.jump = a.next + row * kUnitBytes - ahead.end;
  ahead.far_stride = far.stride;
  alignas(64) float scale[kTileRows];
  alignas(64) float zero[kZeroPoints<F> ? kTileRows : 1];
  // Where the registers reach for it. Not for bf16, whose unpacked weights need them.
  constexpr bool kKeep = Math::kWidth == 4 && R * T <= 12;
  Totals<R, T, kKeep> totals;
  fetch(totals, out);
  int64_t group = -1;
  int64_t group_end = 0;  // the unit where the scales end to hold
  int64_t end;
  for (int64_t begin = 0; begin < units; begin = end) {
    end = kOneSum<F> ? units : segment_end<F>(a, begin, units);
    if (kGroupScales<F> && begin >= group_end) {
      scale_row(a, ++group, scale);
      if constexpr (kZeroPoints<F>) zero_row(a, group, zero);
      group_end = a.group == 0 ? units : group_end + a.group / F::kUnit;
    }
    typename Math::Sum sum[R][T];
#pragma GCC unroll 32
    for (int t = 0; t < T; ++t) {
      const auto start = Math::begin(acts[t] + about<F>(begin, k, block_log2));
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) sum[r][t] = Math::copy(start);
    }
    const int64_t inside = end < whole ? end : whole;
    ahead.at = weights + begin * stride + kPrefetchBytes;
    if (far.from && row == 0) ahead.far = far.from + begin * far.stride;
    multiply<F, R, T>(sum, weights + begin * stride, stride, inside - begin, lanes, acts,
                      begin * F::kUnit * Math::kActBytes, ahead);
    if (end > whole) {
      const char* const unit = tail + row * kUnitBytes;
      multiply<F, R, T>(sum, unit, 0, 1, first_lanes(kLanes), acts,
                        whole * F::kUnit * Math::kActBytes, {unit, unit + 1});
    }
    apply<F, kKeep>({.begin = begin, .end = end, .scale = scale, .zero = zero}, k, block_log2, sum,
                    row, acts, totals, out);
  }
  put_back(totals, out);
}

// A block of unpacked weights that many tokens pass over: some whole segments.
struct Block {
  const char* weights = nullptr;
  const Segment* segments = nullptr;
  int count = 0;
  int64_t k = 0;
  int act_block_log2 = kActBlockLog2;
  // What a call asks for meanwhile: some lines for each run of kRun steps.
  const char* next = nullptr;
  int64_t lines = 0;
};
constexpr int64_t kRun = 8;

// One step of R vectors of rows times T tokens.
template <class F, int R, int T>
inline __attribute__((always_inline)) void multiply_step(typename F::Math::Sum (&sum)[R][T],
                                                         const char* weights,
                                                         const char* const (&act)[T],
                                                         int64_t offset) {
  using Math = typename F::Math;
  typename Math::Weights w[R];
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
    // Formats whose weights need no unpacking are multiplied as they lie.
    if constexpr (kSteps<F> == 1) {
      F::unpack(load_units(weights + r * 64, first_lanes(kLanes)), &w[r]);
    } else {
      w[r] = *reinterpret_cast<const typename Math::Weights*>(weights + r * 64);
    }
  }
#pragma GCC unroll 32
  for (int t = 0; t < T; ++t) {
    const auto a = Math::act(act[t] + offset);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) sum[r][t] = Math::multiply_add(sum[r][t], w[r], a);
  }
}

// R vectors of a block's rows from `row` on, times T tokens.
template <class F, bool kKeep, int R, int T>
__attribute__((noinline)) void block_times_tokens(const Block& block, int64_t row,
                                                  const char* const* acts, float* out) {
  using Math = typename F::Math;
  using Sum = typename Math::Sum;
  constexpr int64_t kStepBytes = Math::kWidth * Math::kActBytes;
  constexpr int64_t kStride = kTileRows * kUnitBytes;  // of a step
  const int64_t k = block.k;
  const int block_log2 = block.act_block_log2;
  const char* weights = block.weights + row * kUnitBytes;
  const char* next = block.next;
  int64_t offset = block.segments[0].begin * F::kUnit * Math::kActBytes;
  const char* act[T];
#pragma GCC unroll 32
  for (int t = 0; t < T; ++t) act[t] = acts[t];
  Totals<R, T, kKeep> totals;
  fetch(totals, out);
  for (int i = 0; i < block.count; ++i) {
    const Segment& s = block.segments[i];
    Sum sum[R][T];
#pragma GCC unroll 32
    for (int t = 0; t < T; ++t) {
      if constexpr (kOneSum<F>) {
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) sum[r][t] = load(out + t * kTileRows + r * kLanes);
      } else {
        const Sum start = Math::begin(act[t] + about<F>(s.begin, k, block_log2));
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) sum[r][t] = Math::copy(start);
      }
    }
    int64_t steps = (s.end - s.begin) * kSteps<F>;
    for (; steps >= kRun; steps -= kRun) {
      for (int64_t line = 0; line < block.lines; ++line) __builtin_prefetch(next + line * 64);
      next += block.lines * 64;
      const char* from[T];
#pragma GCC unroll 32
      for (int t = 0; t < T; ++t) from[t] = act[t] + offset;
#pragma GCC unroll 32
      for (int64_t step = 0; step < kRun; ++step) {
        multiply_step<F, R, T>(sum, weights + step * kStride, from, step * kStepBytes);
      }
      weights += kRun * kStride;
      offset += kRun * kStepBytes;
    }
#pragma GCC unroll 1
    for (; steps > 0; --steps) {
      multiply_step<F, R, T>(sum, weights, act, offset);
      weights += kStride;
      offset += kStepBytes;
    }
    if constexpr (kOneSum<F>) {
#pragma GCC unroll 32
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) store(out + t * kTileRows + r * kLanes, sum[r][t]);
      }
    } else {
      apply<F, kKeep>(s, k, block_log2, sum, row, act, totals, out);
    }
  }
  put_back(totals, out);
}

// Calls f.template operator()<T>() for T = tokens, kLeast to kMost.
template <int kLeast, int kMost, class Function>
inline __attribute__((always_inline)) void with_tokens(int64_t tokens, Function&& f) {
  if constexpr (kMost > kLeast) {
    if (tokens < kMost) return with_tokens<kLeast, kMost - 1>(tokens, f);
  }
  f.template operator()<kMost>();
}

// Units [u0, u1) as block_times_tokens wants them: unpacked, and no row too few.
template <class F>
__attribute__((noinline)) void unpack_block(const MatmulArgs& a, int64_t u0, int64_t u1,
                                            const char* tail, char* out) {
  const int64_t whole = a.row_bytes / kUnitBytes;
  LaneMask lanes[kTileRows / kLanes];
  for (int64_t v = 0; v < kTileRows / kLanes; ++v) {
    lanes[v] = first_lanes(std::clamp<int64_t>(a.rows - v * kLanes, 0, kLanes));
  }
  for (int64_t u = u0; u < u1; ++u, out += kSteps<F> * kTileRows * kUnitBytes) {
    const char* from = u < whole ? a.tile + u * a.rows * kUnitBytes : tail;
    for (int64_t v = 0; v < kTileRows / kLanes; ++v) {
      const U32x16 units = load_units(from + v * 64, u < whole ? lanes[v] : first_lanes(kLanes));
      if constexpr (kSteps<F> == 1) {
        std::memcpy(out + v * 64, &units, sizeof(units));
      } else {
        typename F::Math::Weights w[kSteps<F>];
        F::unpack(units, w);
#pragma GCC unroll 32
        for (int step = 0; step < kSteps<F>; ++step) {
          std::memcpy(out + step * kTileRows * kUnitBytes + v * 64, &w[step], 64);
        }
      }
    }
  }
}

// As many segments from unit u0 on as a block has room for, with their scales and zero points as
// floats, made in `rows`. Returns where the last one ends.
template <class F>
__attribute__((noinline)) int64_t cut_block(const MatmulArgs& a, int64_t u0, int64_t units,
                                            float* rows, Segment* segments, int* count) {
  *count = 0;
  for (int64_t begin = u0; begin < units;) {
    const int64_t end = segment_end<F>(a, begin, units);
    if (end - u0 > kBlockUnits<F>) return begin;
    Segment& s = segments[(*count)++];
    s = {begin, end};
    if constexpr (kGroupScales<F>) {
      const int64_t group = scale_group<F>(a, begin);
      const bool known = begin != u0 && group == scale_group<F>(a, begin - 1);
      s.scale = known ? (&s)[-1].scale : rows;
      s.zero = s.scale + kTileRows;
      if (!known) {
        scale_row(a, group, rows);
        if constexpr (kZeroPoints<F>) zero_row(a, group, rows + kTileRows);
        rows += (1 + kZeroPoints<F>)*kTileRows;
      }
    }
    begin = end;
  }
  return units;
}

// Many tokens: a block of weights is unpacked into L1, and the tokens pass over it, R vectors and T
// tokens at a time.
template <class F, bool kKeep, int R, int T>
void many_tokens(const MatmulArgs& a, const char* tail) {
  const auto* acts = reinterpret_cast<const char* const*>(a.acts);
  const int64_t whole = a.row_bytes / kUnitBytes;
  const int64_t units = whole + (tail != nullptr);
  const bool in_place = kSteps<F> == 1 && a.rows == kTileRows;
  const int64_t unit_bytes = a.rows * kUnitBytes;
  auto* const rows = reinterpret_cast<float*>(a.scratch + kUnpackedBytes);
  const int64_t tiles = (a.tokens + T - 1) / T;
  // While the first tokens pass over a block the next one comes from memory, at a pace that leaves
  // the queue of misses room; while the last ones do, from L2 into L1.
  const int64_t shares = tiles > 4 ? 4 : tiles > 2 ? 2 : 1;
  constexpr int64_t kRuns = kBlockSteps / kRun;
  constexpr int64_t kLines = kRun / kSteps<F> * R;  // of a block in memory, for each run of a call
  Segment segments[kMostSegments];
  int64_t u1;
  for (int64_t u0 = 0; u0 < units; u0 = u1) {
    Block block{
        .weights = a.scratch, .segments = segments, .k = a.k, .act_block_log2 = a.act_block_log2};
    u1 = cut_block<F>(a, u0, units, rows, segments, &block.count);
    if (in_place && u1 <= whole) {
      block.weights = a.tile + u0 * unit_bytes;
    } else {
      unpack_block<F>(a, u0, u1, tail, a.scratch);
    }
    const char* const next = u1 < whole ? a.tile + u1 * unit_bytes : a.next;
    block.next = next;
    int64_t done = 0;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t tokens = (a.tokens - done + tiles - i - 1) / (tiles - i);  // of equal size
      const bool last = i == tiles - 1;
      if (last) block.next = next;
      block.lines = next && (i < shares || last) ? kLines / (last ? 1 : shares) : 0;
      with_tokens<(T + 1) / 2, T>(tokens, [&]<int kTokens>() {
        for (int64_t row = 0; row < kTileRows; row += R * kLanes) {
          const int64_t at = done * kTileRows + row;
          block_times_tokens<F, kKeep, R, kTokens>(block, row, acts + done, a.out + at);
          block.next += block.lines * kRuns * 64;
        }
      });
      done += tokens;
    }
  }
}

// What the registers hold as sums, in vectors of rows times tokens: where weights are unpacked on
// their way from memory (rows as wide as a tile if possible, which makes one linear stream), and
// where they lie unpacked in L1.
struct Registers {
  int few_rows, few_tokens, rows, tokens;
  // Instead of rows and tokens where segments are short: their totals stay in registers too. 0:
  // they do not.
  int short_rows, short_tokens;
};
// Longer segments, in steps, are worth more sums at a time: vdpbf16ps takes so long that fewer wait
// for each other.
template <class F>
constexpr int64_t kShortSteps = F::Math::kWidth == 4 ? 16 : 8;
// Up to so many passes of few tokens, over weights that are in L2 after the first, cost no more
// than to unpack blocks of them for many tokens. On Zen 5: weights that need no unpacking gain by
// staying in L1; nibbles as bytes cost two instructions a vector, less than to store and load them
// again, unless totals stay in registers for it.
template <class F>
constexpr int64_t few_passes(bool short_segments) {
  if (kSteps<F> == 1) return 3;
  if (F::Math::kWidth != 4) return 6;
  return short_segments ? 4 : kTileRows;
}

template <class F, Registers kRegisters>
void matmul(const MatmulArgs& a) {
  std::memset(a.out, 0, a.tokens * kTileRows * sizeof(float));
  alignas(64) char tail_unit[kTileRows * kUnitBytes];
  const char* tail = nullptr;
  if (a.row_bytes % kUnitBytes != 0) {
    load_tail(a, tail_unit);
    tail = tail_unit;
  }
  constexpr int kFew = kRegisters.few_tokens;
  const int64_t passes = (a.tokens + kFew - 1) / kFew;
  const bool short_segments = segment_end<F>(a, 0, kBlockUnits<F>) * kSteps<F> <= kShortSteps<F>;
  if (passes > few_passes<F>(short_segments)) {
    if constexpr (!kOneSum<F> && kRegisters.short_rows != 0) {
      if (short_segments) {
        return many_tokens<F, true, kRegisters.short_rows, kRegisters.short_tokens>(a, tail);
      }
    }
    return many_tokens<F, false, kRegisters.rows, kRegisters.tokens>(a, tail);
  }
  MatmulArgs pass = a;
  for (int64_t i = 0, done = 0; i < passes; ++i, done += pass.tokens) {
    pass.acts = a.acts + done;
    pass.out = a.out + done * kTileRows;
    pass.tokens = (a.tokens - done + passes - i - 1) / (passes - i);
    pass.next = i == passes - 1 ? a.next : a.tile;
    FarShare far;
    if (a.next && passes > 1) {
      const int64_t units = a.row_bytes / kUnitBytes;
      far.stride = std::max<int64_t>(a.rows * kUnitBytes / passes, 64);
      if (i * far.stride < a.rows * kUnitBytes) far.from = a.next + i * units * far.stride;
    }
    with_tokens<1, kFew>(pass.tokens, [&]<int T>() {
      int64_t row = 0;
      for (; row + kRegisters.few_rows * kLanes <= a.rows; row += kRegisters.few_rows * kLanes) {
        few_tokens<F, kRegisters.few_rows, T>(pass, row, tail, far);
      }
      for (; row < a.rows; row += kLanes) few_tokens<F, 1, T>(pass, row, tail, far);
    });
  }
}

}  // namespace lk::LK_ISA

// Multiplies a tile of weights with tokens in AMX's tile registers.
//
// One instruction adds the product of A, 16 tokens x 64 bytes along K, and B, 16 steps x 16 rows of
// weights, to C, 16 tokens x 16 sums. B is how unpacked weights lie in memory (tiles.h), so only
// activations have to be copied, from the rows of their tokens into one block.
//
// Intel's Optimization Reference Manual gives the costs: a product takes the unit 16 cycles if A
// has 16 rows, and its result is there after 52; a load of a tile takes 8 cycles. Four sums, of two
// groups of tokens times two vectors of rows, are products enough to hide the latency, and share
// four loads.
//
// With bf16 this is the only way for any number of tokens. tdpbf16ps adds up the even and the odd
// products of a whole tile before it adds them to C, vdpbf16ps adds each product to the sum, so a
// token that met one of them alone and the other one in a batch would get other bits. How K is cut
// depends on K and the groups only. Sums of bytes are exact in any order.
#pragma once

#include "lk/kernels/arithmetic.h"
#include "lk/kernels/many_tokens.h"

namespace lk::LK_ISA {

// FormatKernels::matmul for formats with kAmx. `last_unit` is the padded last unit, or null.
template <class F>
void amx_tokens(const MatmulArgs& a, const char* last_unit);

#if defined(__AMX_TILE__)

constexpr int64_t kAmxTokens = 16;  // rows of A and C
constexpr int64_t kAmxSteps = 16;   // rows of B, and four bytes of A each
constexpr int64_t kStepStride = kTileRows * kUnitBytes;
constexpr int64_t kActStride = kBlockSteps * 4;

// The tile registers: C, then A, then B.
constexpr int amx_sum(int group, int vector) { return 2 * group + vector; }
constexpr int amx_acts(int group) { return 4 + group; }
constexpr int amx_weights(int vector) { return 6 + vector; }

// How many steps one product takes: the most that divide every segment, except for one that ends
// with K, where weights are padded with zeros.
template <class F>
int64_t amx_steps(const MatmulArgs& a) {
  const int64_t length = kQuantisedActs<F> ? int64_t{1} << a.act_block_log2 : a.group;
  int64_t steps = kAmxSteps;
  while (length / F::Math::kStepWeights % steps != 0) steps /= 2;
  return steps;
}

// All eight registers, for groups of so many tokens.
inline void configure_tiles(int64_t tokens, int64_t steps) {
  TileConfig config;
  const auto set = [&](int tile, int64_t rows, int64_t row_bytes) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
  };
  for (int i = 0; i < 2; ++i) {
    for (int vector = 0; vector < 2; ++vector) set(amx_sum(i, vector), tokens, kLanes * 4);
    set(amx_acts(i), tokens, steps * 4);
    set(amx_weights(i), steps, kLanes * kUnitBytes);
  }
  configure_tiles(config);
}

// Two vectors of a block's rows from `row` on, times kGroups groups of up to 16 tokens. `acts` are
// the activations of the block, [kGroups][kAmxTokens][kActStride] bytes, and `rows` the packed rows
// of `tokens` tokens, of which each group but the last has `group_tokens`.
template <class F, int kGroups>
__attribute__((noinline)) void block_times_groups(const Block& block, int64_t steps, int64_t row,
                                                  const char* acts, const char* const* rows,
                                                  int64_t group_tokens, int64_t tokens,
                                                  float* out) {
  using Math = typename F::Math;
  constexpr int64_t kSumStride = 2 * kLanes * 4;  // of a token
  alignas(64) char sums[kGroups * kAmxTokens * kSumStride];
  const int64_t k = block.k;
  const int block_log2 = block.act_block_log2;
  const char* weights = block.weights + row * kUnitBytes;
  const char* next = block.next;
  const auto prefetch = [&] {
    for (int64_t line = 0; line < block.lines; ++line) __builtin_prefetch(next + line * 64);
    next += block.lines * 64;
  };
  for (int i = 0; i < block.count; ++i) {
    const Segment& s = block.segments[i];
    zero_tile<amx_sum(0, 0)>();
    zero_tile<amx_sum(0, 1)>();
    if constexpr (kGroups == 2) {
      zero_tile<amx_sum(1, 0)>();
      zero_tile<amx_sum(1, 1)>();
    }
    for (int64_t left = (s.end - s.begin) * kSteps<F>; left > 0; left -= steps) {
      prefetch();
      load_tile<amx_weights(0)>(weights, kStepStride);
      load_tile<amx_acts(0)>(acts, kActStride);
      Math::template multiply_tiles<amx_sum(0, 0), amx_acts(0), amx_weights(0)>();
      prefetch();
      load_tile<amx_weights(1)>(weights + kLanes * kUnitBytes, kStepStride);
      Math::template multiply_tiles<amx_sum(0, 1), amx_acts(0), amx_weights(1)>();
      if constexpr (kGroups == 2) {
        load_tile<amx_acts(1)>(acts + kAmxTokens * kActStride, kActStride);
        Math::template multiply_tiles<amx_sum(1, 0), amx_acts(1), amx_weights(0)>();
        Math::template multiply_tiles<amx_sum(1, 1), amx_acts(1), amx_weights(1)>();
      }
      weights += steps * kStepStride;
      acts += steps * 4;
    }
    store_tile<amx_sum(0, 0)>(sums, kSumStride);
    store_tile<amx_sum(0, 1)>(sums + kLanes * 4, kSumStride);
    if constexpr (kGroups == 2) {
      store_tile<amx_sum(1, 0)>(sums + group_tokens * kSumStride, kSumStride);
      store_tile<amx_sum(1, 1)>(sums + group_tokens * kSumStride + kLanes * 4, kSumStride);
    }
    const int64_t info = block_info_offset<F>(s.begin, k, block_log2);
    for (int64_t t = 0; t < tokens; ++t) {
      typename Math::Sum sum[2][1];
      for (int64_t vector = 0; vector < 2; ++vector) {
        sum[vector][0] =
            Math::from_tile(sums + t * kSumStride + vector * kLanes * 4, rows[t] + info);
      }
      Totals<2, 1, false> totals;
      add_segment<F, false>(s, k, block_log2, sum, row, rows + t, totals, out + t * kTileRows);
    }
  }
}

template <class F>
void amx_tokens(const MatmulArgs& a, const char* last_unit) {
  const auto* rows = reinterpret_cast<const char* const*>(a.acts);
  const int64_t whole = a.row_bytes / kUnitBytes;
  const int64_t units = whole + (last_unit != nullptr);
  const int64_t unit_bytes = a.rows * kUnitBytes;
  const int64_t steps = amx_steps<F>(a);
  const int64_t groups = (a.tokens + kAmxTokens - 1) / kAmxTokens;
  const int64_t group_tokens = (a.tokens + groups - 1) / groups;
  // Only bf16 lies in memory as it is multiplied; the bytes of a format with one step are not yet
  // unsigned.
  const bool in_place = kSteps<F> == 1 && !kQuantisedActs<F> && a.rows == kTileRows;
  auto* const scales = reinterpret_cast<float*>(a.scratch + kUnpackedBytes);
  alignas(64) char acts[2 * kAmxTokens * kActStride];
  Segment segments[kMostSegments];
  configure_tiles(group_tokens, steps);
  int64_t u1;
  for (int64_t u0 = 0; u0 < units; u0 = u1) {
    Block block{
        .weights = a.scratch, .segments = segments, .k = a.k, .act_block_log2 = a.act_block_log2};
    u1 = list_segments<F>(a, u0, units, scales, segments, &block.count);
    const int64_t block_steps = (u1 - u0) * kSteps<F>;
    const int64_t padded_steps = (block_steps + steps - 1) / steps * steps;
    if (in_place && u1 <= whole && padded_steps == block_steps) {
      block.weights = a.tile + u0 * unit_bytes;
    } else {
      unpack_block<F>(a, u0, u1, last_unit, a.scratch);
      std::memset(a.scratch + block_steps * kStepStride, 0,
                  (padded_steps - block_steps) * kStepStride);
    }
    // While the first tokens pass over a block, the next one is prefetched from memory, a part
    // before each load of weights.
    block.next = u1 < whole ? a.tile + u1 * unit_bytes : a.next;
    block.lines = block.next ? steps / kSteps<F> : 0;
    for (int64_t done = 0; done < a.tokens; done += 2 * group_tokens) {
      const int64_t tokens = min(2 * group_tokens, a.tokens - done);
      // The last group may have fewer tokens than its registers have rows. Their sums are not used.
      const int64_t filled = tokens > group_tokens ? 2 * group_tokens : group_tokens;
      for (int64_t t = 0; t < filled; ++t) {
        const char* from = rows[done + min(t, tokens - 1)];
        std::memcpy(acts + (t / group_tokens * kAmxTokens + t % group_tokens) * kActStride,
                    from + u0 * F::kUnitWeights * F::Math::kActBytes, padded_steps * 4);
      }
      for (int64_t row = 0; row < a.rows; row += 2 * kLanes) {
        float* const out = a.out + done * kTileRows + row;
        if (tokens > group_tokens) {
          block_times_groups<F, 2>(block, steps, row, acts, rows + done, group_tokens, tokens, out);
        } else {
          block_times_groups<F, 1>(block, steps, row, acts, rows + done, group_tokens, tokens, out);
        }
        block.next += 2 * block.lines * (padded_steps / steps) * 64;
      }
      block.lines = 0;
    }
  }
  release_tiles();
}

#endif

}  // namespace lk::LK_ISA

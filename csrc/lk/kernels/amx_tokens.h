// Multiplies a tile of weights with tokens in AMX's tile registers.
//
// One instruction adds the product of A, 16 tokens x 64 bytes along K, and B, 16 steps x 16 rows of
// weights, to C, 16 tokens x 16 sums. B is how unpacked weights lie in memory (tiles.h), and
// activations are copied into the order of A (Panels). Two groups of tokens times two vectors of
// rows are four products, which share four loads.
//
// On a Xeon with 480 MiB of L3, a product of 16 tokens takes the unit 16 cycles, one of at most 8
// takes 9, and a load from L1 takes 8. A line of weights from memory occupies one of L1's 16 fill
// buffers about as long as four lines from L2 do, so reading the weights and multiplying overlap
// only as far as the operands are in L1. That is why K is cut into blocks of 16 KiB of weights also
// where weights need no unpacking: with 64 tokens, bf16 takes 0.6 of the time that sums over all of
// K in registers take, whose operands come from L2.
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
constexpr int64_t kPairTokens = 2 * kAmxTokens;
constexpr int64_t kStepStride = kTileRows * kUnitBytes;
constexpr int64_t kOutStride = kTileRows * static_cast<int64_t>(sizeof(float));

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

// Activations as the tile registers load them: for each group of at most 16 tokens, 64 bytes of
// each of them, then the next 64 bytes. All that a group needs follows each other in memory. Packed
// rows that are 4 KiB apart need the same 12 lines of L1, which made products a fifth slower; and
// with rows at other distances, each in a page of its own, a core read 8.6 GB/s of weights beside
// 64 tokens, instead of 11 GB/s. What a packed row holds behind its activations follows the groups,
// token after token.
template <class F>
struct Panels {
  int64_t acts_bytes;  // of a packed row
  int64_t row_bytes;
  int64_t tokens;
  int64_t groups;
  int64_t group_tokens;
  int64_t group_bytes;

  Panels(int64_t k, int64_t all_tokens)
      : acts_bytes(act_blocks(k) * kActBlock * F::Math::kActBytes),
        row_bytes(act_row_bytes<F>(k)),
        tokens(all_tokens),
        // Two at a time, unless one is enough.
        groups(tokens <= kAmxTokens ? 1 : (tokens + kPairTokens - 1) / kPairTokens * 2),
        group_tokens((tokens + groups - 1) / groups),
        group_bytes((acts_bytes + 63) / 64 * 64 * group_tokens) {}

  int64_t rest_bytes() const { return row_bytes - acts_bytes; }
  int64_t bytes() const { return groups * group_bytes + (tokens * rest_bytes() + 63) / 64 * 64; }
  // Where the 64 bytes of a group's first token lie that hold byte `at` of a packed row.
  int64_t offset(int64_t group, int64_t at) const {
    return group * group_bytes + at / 64 * 64 * group_tokens + at % 64;
  }
  // Such that what a token's packed row holds at `at`, behind its activations, is at rest() + at.
  const char* rest(const char* panels, int64_t token) const {
    return panels + groups * group_bytes + token * rest_bytes() - acts_bytes;
  }
};

// FormatKernels::gathered_bytes and gather.
template <class F>
int64_t amx_gathered_bytes(int64_t k, int64_t tokens) {
  return Panels<F>(k, tokens).bytes();
}
template <class F>
void amx_gather(const void* const* rows, int64_t tokens, int64_t k, void* out) {
  const Panels<F> panels(k, tokens);
  auto* const to = static_cast<char*>(out);
  for (int64_t t = 0; t < panels.groups * panels.group_tokens; ++t) {
    char* line = to + panels.offset(t / panels.group_tokens, 0) + t % panels.group_tokens * 64;
    const auto* const row = static_cast<const char*>(t < tokens ? rows[t] : nullptr);
    for (int64_t at = 0; at < panels.acts_bytes; at += 64, line += panels.group_tokens * 64) {
      const int64_t bytes = row != nullptr ? min(panels.acts_bytes - at, 64) : 0;
      if (bytes != 64) std::memset(line, 0, 64);
      if (bytes != 0) std::memcpy(line, row + at, bytes);
    }
    if (row == nullptr) continue;
    std::memcpy(to + panels.groups * panels.group_bytes + t * panels.rest_bytes(),
                row + panels.acts_bytes, panels.rest_bytes());
  }
}

// Rows of weights in memory that are prefetched a few lines at a time.
struct Ahead {
  const char* line = nullptr;
  const char* end = nullptr;
  int64_t lines = 0;  // each time

  inline __attribute__((always_inline)) void prefetch() {
    for (int64_t i = 0; i < lines && line < end; ++i, line += 64) __builtin_prefetch(line, 0, 2);
  }
};

// One or two groups of tokens.
struct TokenPair {
  int64_t first = 0;  // token
  int64_t tokens = 0;
  int64_t group = 0;  // the first one
  float* out = nullptr;
};

// Sums of a segment, as the tile registers left them. They wait to be scaled and added to the
// totals until the next segment is multiplied: a product occupies the tile unit for 16 cycles in
// which the vector units have nothing else to do.
template <class F>
struct WaitingSums {
  static constexpr int64_t kStride = 2 * kLanes * 4;  // of a token
  alignas(64) char sums[kPairTokens * kStride];
  Segment segment;
  int64_t k = 0;
  int block_log2 = 0;
  const char* rest = nullptr;  // Panels::rest of the pair's first token
  int64_t rest_stride = 0;
  int64_t row = 0;
  TokenPair pair;
  int64_t done = 0;  // of the pair's tokens

  int64_t left() const { return pair.tokens - done; }
  // Of `count` tokens. All that the loop needs is in registers, since its stores might change
  // anything else.
  inline __attribute__((always_inline)) void add(int64_t count) {
    using Math = typename F::Math;
    const int64_t tokens = min(count, left());
    if (tokens <= 0) return;
    const Segment s = segment;
    const int64_t all_k = k;
    const int log2 = block_log2;
    F32x16 scale[2] = {}, low[2] = {};
    for (int v = 0; v < 2; ++v) {
      if constexpr (kGroupScales<F>) scale[v] = load(s.scale + row + v * kLanes);
      if constexpr (kZeroPoints<F>) low[v] = load(s.low + row + v * kLanes);
    }
    const char* from = sums + done * kStride;
    const int64_t stride = rest_stride;
    const char* acts = rest + done * stride;
    const int64_t info = block_info_offset<F>(s.begin, all_k, log2);
    float* out = pair.out + done * kTileRows + row;
    done += tokens;
    for (const float* const end = out + tokens * kTileRows; out != end; out += kTileRows) {
      const float act_scale = kQuantisedActs<F> ? Math::scale(acts + info) : 1.0f;
      const F32x16 minus = minus_act_sum<F>(acts, s.begin, s.end, all_k, log2);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        store(out + v * kLanes,
              add_scaled<F>(load(out + v * kLanes), Math::from_tile(from + v * kLanes * 4),
                            act_scale, minus, scale[v], low[v]));
      }
      from += kStride;
      acts += stride;
    }
  }
};

template <int kGroups>
inline __attribute__((always_inline)) void zero_sums() {
  zero_tile<amx_sum(0, 0)>();
  zero_tile<amx_sum(0, 1)>();
  if constexpr (kGroups == 2) {
    zero_tile<amx_sum(1, 0)>();
    zero_tile<amx_sum(1, 1)>();
  }
}
template <int kGroups>
inline __attribute__((always_inline)) void load_sums(const char* from, int64_t stride,
                                                     int64_t first_group) {
  load_tile<amx_sum(0, 0)>(from, stride);
  load_tile<amx_sum(0, 1)>(from + kLanes * 4, stride);
  if constexpr (kGroups == 2) {
    load_tile<amx_sum(1, 0)>(from + first_group * stride, stride);
    load_tile<amx_sum(1, 1)>(from + first_group * stride + kLanes * 4, stride);
  }
}
template <int kGroups>
inline __attribute__((always_inline)) void store_sums(char* to, int64_t stride,
                                                      int64_t first_group) {
  store_tile<amx_sum(0, 0)>(to, stride);
  store_tile<amx_sum(0, 1)>(to + kLanes * 4, stride);
  if constexpr (kGroups == 2) {
    store_tile<amx_sum(1, 0)>(to + first_group * stride, stride);
    store_tile<amx_sum(1, 1)>(to + first_group * stride + kLanes * 4, stride);
  }
}

// Two vectors of a block's rows from `row` on, times one or two groups of tokens.
template <class F, int kGroups>
__attribute__((noinline)) void block_times_pair(const Block& block, int64_t steps, int64_t row,
                                                const Panels<F>& panels, const char* gathered,
                                                const TokenPair& pair, Ahead& all_ahead,
                                                WaitingSums<F>& waiting) {
  using Math = typename F::Math;
  constexpr int64_t kStepBytes = 4;  // of a token's activations
  const char* weights = block.weights + row * kUnitBytes;
  const int64_t group_tokens = panels.group_tokens;
  const int64_t group_bytes = panels.group_bytes;
  const char* const acts = gathered + pair.group * group_bytes;
  int64_t at = block.segments[0].begin * F::kUnitWeights * Math::kActBytes;
  auto* const out = reinterpret_cast<char*>(pair.out + row);
  Ahead ahead = all_ahead;
  for (int i = 0; i < block.count; ++i) {
    const Segment& s = block.segments[i];
    if constexpr (kOneSum<F>) {
      load_sums<kGroups>(out, kOutStride, group_tokens);
    } else {
      zero_sums<kGroups>();
    }
    int64_t left = (s.end - s.begin) * kSteps<F>;
    const int64_t share = kOneSum<F> ? 0 : (waiting.left() * steps + left - 1) / left;
    for (; left > 0; left -= steps) {
      const char* const from = acts + panels.offset(0, at);
      load_tile<amx_weights(0)>(weights, kStepStride);
      load_tile<amx_acts(0)>(from, 64);
      Math::template multiply_tiles<amx_sum(0, 0), amx_acts(0), amx_weights(0)>();
      load_tile<amx_weights(1)>(weights + kLanes * kUnitBytes, kStepStride);
      Math::template multiply_tiles<amx_sum(0, 1), amx_acts(0), amx_weights(1)>();
      if constexpr (kGroups == 2) {
        load_tile<amx_acts(1)>(from + group_bytes, 64);
        Math::template multiply_tiles<amx_sum(1, 0), amx_acts(1), amx_weights(0)>();
        Math::template multiply_tiles<amx_sum(1, 1), amx_acts(1), amx_weights(1)>();
      }
      ahead.prefetch();
      if constexpr (!kOneSum<F>) waiting.add(share);
      weights += steps * kStepStride;
      at += steps * kStepBytes;
    }
    if constexpr (kOneSum<F>) {
      store_sums<kGroups>(out, kOutStride, group_tokens);
    } else {
      store_sums<kGroups>(waiting.sums, WaitingSums<F>::kStride, group_tokens);
      waiting.segment = s;
      waiting.rest = panels.rest(gathered, pair.first);
      waiting.row = row;
      waiting.pair = pair;
      waiting.done = 0;
    }
  }
  all_ahead = ahead;
}

template <class F>
void amx_tokens(const MatmulArgs& a, const char* last_unit) {
  const int64_t whole = a.row_bytes / kUnitRowBytes<F>;
  const int64_t units = whole + (last_unit != nullptr);
  const int64_t unit_bytes = a.rows * kUnitRowBytes<F>;
  const int64_t steps = amx_steps<F>(a);
  const Panels<Unpacked<F>> panels(a.k, a.tokens);
  const int64_t pairs = (panels.groups + 1) / 2;
  const int64_t pair_tokens = a.tokens <= kAmxTokens ? a.tokens : 2 * panels.group_tokens;
  const bool in_place = kStoredAsMultiplied<F> && a.rows == kTileRows;
  auto* const scales = reinterpret_cast<float*>(a.scratch + kUnpackedBytes);
  Segment segments[kMostSegments];
  WaitingSums<Unpacked<F>> waiting;
  waiting.k = a.k;
  waiting.block_log2 = a.act_block_log2;
  waiting.rest_stride = panels.rest_bytes();
  configure_tiles(panels.group_tokens, steps);
  int64_t u1;
  for (int64_t u0 = 0; u0 < units; u0 = u1) {
    Block block{
        .weights = a.scratch, .segments = segments, .k = a.k, .act_block_log2 = a.act_block_log2};
    // Its scales take the place of those that the last block's sums still wait for.
    waiting.add(kPairTokens);
    u1 = list_segments<F>(a, u0, units, kBlockUnits<F>, scales, segments, &block.count);
    const int64_t block_steps = (u1 - u0) * kSteps<F>;
    const int64_t products = (block_steps + steps - 1) / steps;
    if (in_place && u1 <= whole && products * steps == block_steps) {
      block.weights = a.tile + u0 * unit_bytes;
    } else {
      unpack_block<F>(a, u0, u1, last_unit, a.scratch);
      std::memset(a.scratch + block_steps * kStepStride, 0,
                  (products * steps - block_steps) * kStepStride);
    }
    // While the tokens pass over a block, the next one is prefetched from memory.
    Ahead ahead{.line = u1 < whole ? a.tile + u1 * unit_bytes : a.next};
    if (ahead.line != nullptr) {
      const int64_t lines = (u1 - u0) * unit_bytes / 64;
      const int64_t times = products * pairs * (kTileRows / (2 * kLanes));
      ahead.end = ahead.line + lines * 64;
      ahead.lines = (lines + times - 1) / times;
    }
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t first = i * pair_tokens;
      const TokenPair pair{first, max(min(a.tokens - first, pair_tokens), 0), 2 * i,
                           a.out + first * kTileRows};
      for (int64_t row = 0; row < a.rows; row += 2 * kLanes) {
        if (panels.groups == 1) {
          block_times_pair<Unpacked<F>, 1>(block, steps, row, panels, a.gathered, pair, ahead,
                                           waiting);
        } else {
          block_times_pair<Unpacked<F>, 2>(block, steps, row, panels, a.gathered, pair, ahead,
                                           waiting);
        }
      }
    }
  }
  waiting.add(kPairTokens);
  release_tiles();
}

#endif

}  // namespace lk::LK_ISA

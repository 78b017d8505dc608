// The rows of a tile times any number of tokens, for any format: chooses between few_tokens.h,
// many_tokens.h and amx_tokens.h.
#pragma once

#include <type_traits>

#include "lk/kernels/amx_tokens.h"
#include "lk/kernels/few_tokens.h"
#include "lk/kernels/formats/k_quants.h"
#include "lk/kernels/many_tokens.h"

namespace lk::LK_ISA {

// The sums that an instruction set holds in registers, as vectors of rows times tokens.
struct Registers {
  // Where weights are unpacked on their way from memory. Rows are as wide as a tile where possible,
  // so that the tile is one linear stream.
  int few_rows, few_tokens;
  // Where weights lie unpacked in L1.
  int many_rows, many_tokens;
  // The same where segments are short, whose totals stay in registers, too. 0: they do not.
  int short_rows = 0, short_tokens = 0;
};
// Segments of at most so many steps are short. For longer ones, more sums at a time are worth more
// than totals in registers. The latency of vdpbf16ps is so long that few sums would wait for each
// other, so the limit is lower for bf16.
template <class F>
constexpr int64_t kShortSteps = kQuantisedActs<F> ? 16 : 8;

// How many passes of few_tokens, over weights that are in L2 after the first, cost no more than to
// unpack blocks of them for many_tokens. Measured on Zen 5. Weights with one step a unit gain by
// staying in L1. Nibbles as bytes cost two instructions a vector, less than to store and load them
// again, unless many_tokens keeps the totals in registers. Measured on Zen 3 with AVX2: after two
// passes, fp8 takes 0.66 of the time at 4 tokens an expert, and fp16 0.75; others take longer. What
// is not unpacked at all, as bf16 there, takes 0.95 of the time at 2 tokens an expert already.
//
// With AVX2 and passes of four tokens (kRowsInTurn), measured on Zen 4: one pass, if the weights
// have high bits in a plane of their own or are entries of tables, since many_tokens takes 0.7 to
// 0.9 of the time of two then.
template <class F>
constexpr int64_t few_passes(bool short_segments) {
  constexpr bool kBytes = F::Math::kStepWeights == 4;
  if constexpr (kRowsInTurn<F>) {
    if constexpr (requires { F::kHighBits; }) {
      if (F::kHighBits != 0) return 1;
    }
    return kOwnScales<F> && kSlowUnpack<F> ? 1 : kBytes ? 4 : 2;
  }
  if (kQuickUnpack<F>) return 1;
  if (kSlowUnpack<F>) return 2;
  if (kSteps<F> == 1) return 3;
  if (kQuantisedActs<F> && short_segments) return 4;
  return kBytes ? kTileRows : 6;
}

// How many tokens a pass of few_tokens takes. With AVX-512, two with activations of 16 bits and
// formats of blocks, since there are many such formats, and each number is one more loop to
// compile. Q6_K alone has 16 bits by default wherever a pass may have more, and so has as many as
// others.
template <class F, Registers kRegisters>
constexpr int kFewTokens = kRowsInTurn<F> ? kTokensInTurn
                           : kOwnScales<F> && F::Math::kActBytes == 2 && !std::is_same_v<F, Q6K>
                               ? min(kRegisters.few_tokens, 2)
                               : kRegisters.few_tokens;

// Whether few_tokens is for whole tiles only. A matrix has one at most that is not whole, and with
// fewer rows in a pass formats of blocks would take twice as long to compile. The blocks of AMX are
// not for few tokens.
template <class F>
constexpr bool kWholeTilesOnly = kOwnScales<F> && !kAmx<F>;

// All tokens in passes of few_tokens.
template <class F, Registers kRegisters>
void passes_of_few(const MatmulArgs& a, int64_t passes, const char* last_unit) {
  MatmulArgs pass = a;
  for (int64_t i = 0, done = 0; i < passes; ++i, done += pass.tokens) {
    pass.acts = a.acts + done;
    pass.out = a.out + done * kTileRows;
    pass.tokens = (a.tokens - done + passes - i - 1) / (passes - i);
    pass.next = i == passes - 1 ? a.next : a.tile;
    NextTilePart next_tile;
    if (a.next && passes > 1) {
      const int64_t units = a.row_bytes / kUnitRowBytes<F>;
      next_tile.stride = max(a.rows * kUnitRowBytes<F> / passes, 64);
      if (i * next_tile.stride < a.rows * kUnitRowBytes<F>) {
        next_tile.begin = a.next + i * units * next_tile.stride;
      }
    }
    with_constant_tokens<1, kFewTokens<F, kRegisters>>(pass.tokens, [&]<int T>() {
      int64_t row = 0;
      for (; row + kRegisters.few_rows * kLanes <= a.rows; row += kRegisters.few_rows * kLanes) {
        few_tokens<F, kRegisters.few_rows, T>(pass, row, last_unit, next_tile);
      }
      if constexpr (!kWholeTilesOnly<F>) {
        for (; row < a.rows; row += kLanes) few_tokens<F, 1, T>(pass, row, last_unit, next_tile);
      }
    });
  }
}

// Few tokens in passes, many in blocks of weights.
template <class F, Registers kRegisters>
void few_or_many_tokens(const MatmulArgs& a, const char* last_unit) {
  constexpr int kFew = kFewTokens<F, kRegisters>;
  const int64_t passes = (a.tokens + kFew - 1) / kFew;
  if constexpr (kWholeTilesOnly<F>) {
    if (a.rows != kTileRows) {
      return many_tokens<F, false, kRegisters.many_rows, 1, kRegisters.many_tokens>(a, last_unit);
    }
  }
  // Of several passes of many_tokens, none has less than half of the most, because they are of
  // equal size, and one alone may have as few as are left for it.
  constexpr int kLeft = min(few_passes<F>(true), few_passes<F>(false)) * kFew + 1;
  constexpr int kLeast = min((kRegisters.many_tokens + 1) / 2, kLeft);
  constexpr int kShortLeast = min((kRegisters.short_tokens + 1) / 2, kLeft);
  const bool short_segments = segment_end<F>(a, 0, kBlockUnits<F>) * kSteps<F> <= kShortSteps<F>;
  if (passes <= few_passes<F>(short_segments)) {
    return passes_of_few<F, kRegisters>(a, passes, last_unit);
  }
  if constexpr (!kOneSum<F> && kRegisters.short_rows != 0) {
    if (short_segments) {
      return many_tokens<F, true, kRegisters.short_rows, kShortLeast, kRegisters.short_tokens>(
          a, last_unit);
    }
  }
  many_tokens<F, false, kRegisters.many_rows, kLeast, kRegisters.many_tokens>(a, last_unit);
}

// FormatKernels::matmul.
template <class F, Registers kRegisters>
void matmul(const MatmulArgs& a) {
  std::memset(a.out, 0, a.tokens * kTileRows * sizeof(float));
  alignas(64) char padded[kTileRows * kUnitBytes];
  const char* last_unit = nullptr;
  if (kUnitVectors<F> == 1 && a.row_bytes % kUnitBytes != 0) {
    pad_last_unit(a, padded);
    last_unit = padded;
  }
  if constexpr (kAmxOnly<F>) {
    amx_tokens<F>(a, last_unit);
  } else if constexpr (kAmx<F>) {
    // A second pass would unpack the weights again. Where AMX begins to pay has not been measured.
    if (a.tokens <= kRegisters.few_tokens) {
      passes_of_few<F, kRegisters>(a, 1, last_unit);
    } else {
      amx_tokens<F>(a, last_unit);
    }
  } else {
    few_or_many_tokens<F, kRegisters>(a, last_unit);
  }
}

}  // namespace lk::LK_ISA

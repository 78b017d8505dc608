// Rows times tokens, for any format: F loads a run of weights and multiplies it with activations.
#pragma once

#include "lk/kernels.h"
#include "lk/simd.h"

namespace lk::LK_ISA {

// How far ahead of a row's use its lines are asked for. One stream of rows with 4 KiB reached 92%
// of the read bandwidth on Zen 4, four interleaved streams 55%; the hardware's own prefetcher alone
// stops at every page.
constexpr int64_t kPrefetchBytes = 4096;

// R rows times T tokens. Each product is summed over all of K in order, step i into chain i modulo
// kChains, whatever R and T: this is what makes a token's result independent of its batch.
// kPrefetch asks for R rows at `ahead` on the way: 0 not at all, 3 into L1, 2 into L2.
template <class F, int R, int T, int kPrefetch>
inline __attribute__((always_inline)) void tile(const char* weights, int64_t row_bytes, int64_t k,
                                                const void* const* acts, float* const* out,
                                                int64_t row, const char* ahead) {
  constexpr int kChains = F::kChains;
  const typename F::Act* act[T];
  for (int t = 0; t < T; ++t) act[t] = static_cast<const typename F::Act*>(acts[t]);
  F32x16 acc[kChains][R][T];
  for (auto& chain : acc) {
    for (auto& of_row : chain) {
      for (auto& sum : of_row) sum = zeros();
    }
  }
  int64_t at = 0;
  for (; at + kChains * F::kStep <= k; at += kChains * F::kStep) {
    const int64_t byte = at / F::kStep * F::kBytes;
    for (int c = 0; c < kChains; ++c) {
      typename F::Weights w[R];
      for (int r = 0; r < R; ++r) {
        const int64_t offset = r * row_bytes + byte + c * F::kBytes;
        w[r] = F::load(weights + offset);
        // In the order of addresses, not of rows: one linear stream is what the memory likes.
        if (kPrefetch && c == 0) {
          __builtin_prefetch(ahead + byte * R + r * kChains * F::kBytes, 0, kPrefetch);
        }
      }
      for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) {
          acc[c][r][t] = F::fma(acc[c][r][t], w[r], act[t] + at + c * F::kStep);
        }
      }
    }
  }
  for (int c = 0; at < k; ++c, at += F::kStep) {
    const int64_t byte = at / F::kStep * F::kBytes;
    for (int r = 0; r < R; ++r) {
      const char* from = weights + r * row_bytes + byte;
      const auto w = at + F::kStep <= k ? F::load(from) : F::load_tail(from, int(k - at));
      for (int t = 0; t < T; ++t)
        acc[c % kChains][r][t] = F::fma(acc[c % kChains][r][t], w, act[t] + at);
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) {
      for (int c = 1; c < kChains; ++c) acc[0][r][t] = add(acc[0][r][t], acc[c][r][t]);
      if (R != 4) out[t][row + r] = sum(acc[0][r][t]);
    }
    if constexpr (R == 4) {
      sum4(acc[0][0][t], acc[0][1][t], acc[0][2][t], acc[0][3][t], out[t] + row);
    }
  }
}

// The tile for `tokens`, 1 to T.
template <class F, int R, int T, int kPrefetch>
inline __attribute__((always_inline)) void tile_of(int64_t tokens, const char* weights,
                                                   int64_t row_bytes, int64_t k,
                                                   const void* const* acts, float* const* out,
                                                   int64_t row, const char* ahead) {
  if constexpr (T == 1) {
    tile<F, R, 1, kPrefetch>(weights, row_bytes, k, acts, out, row, ahead);
  } else if (tokens == T) {
    tile<F, R, T, kPrefetch>(weights, row_bytes, k, acts, out, row, ahead);
  } else {
    tile_of<F, R, T - 1, kPrefetch>(tokens, weights, row_bytes, k, acts, out, row, ahead);
  }
}

// Few tokens: the time goes into reading weights, so those a few KiB ahead are asked for, and at
// the end of the run the start of the next one.
template <class F, int R, int T>
void one_pass(const MatmulArgs& a) {
  const char* row = static_cast<const char*>(a.weights);
  const char* next = static_cast<const char*>(a.next);
  const int64_t ahead = (kPrefetchBytes + R * a.row_bytes - 1) / (R * a.row_bytes) * R;
  const int64_t whole = a.rows / R * R;
  for (int64_t r = 0; r < whole; r += R, row += R * a.row_bytes) {
    const char* asked = row + ahead * a.row_bytes;
    if (r + ahead >= a.rows) asked = next ? next + (r + ahead - a.rows) * a.row_bytes : row;
    tile_of<F, R, T, 3>(a.tokens, row, a.row_bytes, a.k, a.acts, a.out, r, asked);
  }
  for (int64_t r = whole; r < a.rows; ++r, row += a.row_bytes) {
    tile_of<F, 1, T, 0>(a.tokens, row, a.row_bytes, a.k, a.acts, a.out, r, nullptr);
  }
}

// Many tokens: a tile of them stays in L1 while the rows pass from L2. All passes but the first
// also ask for a part of the next run, so that it is in L2 when its turn comes.
template <class F, int R, int T>
void by_tiles(const MatmulArgs& a) {
  const char* weights = static_cast<const char*>(a.weights);
  const char* next = static_cast<const char*>(a.next);
  const int64_t tiles = (a.tokens + T - 1) / T;
  const int64_t whole = a.rows / R * R;
  int64_t done = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t tokens = (a.tokens - done + tiles - i - 1) / (tiles - i);  // tiles of equal size
    const auto* acts = a.acts + done;
    auto* out = a.out + done;
    for (int64_t r = 0; r < whole; r += R) {
      const char* here = weights + r * a.row_bytes;
      if (i == 0) {
        tile_of<F, R, T, 2>(tokens, here, a.row_bytes, a.k, acts, out, r, here + R * a.row_bytes);
      } else if (next && r / R % (tiles - 1) == i - 1) {
        tile_of<F, R, T, 2>(tokens, here, a.row_bytes, a.k, acts, out, r, next + r * a.row_bytes);
      } else {
        tile_of<F, R, T, 0>(tokens, here, a.row_bytes, a.k, acts, out, r, nullptr);
      }
    }
    for (int64_t r = whole; r < a.rows; ++r) {
      tile_of<F, 1, T, 0>(tokens, weights + r * a.row_bytes, a.row_bytes, a.k, acts, out, r,
                          nullptr);
    }
    done += tokens;
  }
}

// kRows x kTokens is what the registers hold as accumulators.
template <class F, int kRows, int kTokens>
void matmul(const MatmulArgs& a) {
  if (a.tokens <= kTokens) {
    one_pass<F, 1, kTokens>(a);
  } else {
    by_tiles<F, kRows, kTokens>(a);
  }
}

template <class F>
void pack(const void* x, Scalar type, int64_t n, float scale, void* out) {
  auto* act = static_cast<typename F::Act*>(out);
  const auto* in = static_cast<const uint16_t*>(x);
  if (type == Scalar::kBf16 && sizeof(*act) == sizeof(*in) && scale == 1.0f) {
    std::memcpy(act, in, n * sizeof(*in));
  } else if (type == Scalar::kBf16) {
    for (int64_t i = 0; i < n; ++i) act[i] = F::to_act(bf16_to_float(in[i]) * scale);
  } else {
    for (int64_t i = 0; i < n; ++i) act[i] = F::to_act(fp16_to_float(in[i]) * scale);
  }
  for (int64_t i = n; i < padded(n); ++i) act[i] = 0;
}

inline void combine(const float* rows, int64_t stride, const float* weights, const int32_t* ids,
                    int topk, int64_t n, Scalar type, void* out) {
  auto* y = static_cast<uint16_t*>(out);
  constexpr int64_t kBlock = 256;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    float total[kBlock] = {};
    for (int j = 0; j < topk; ++j) {
      if (ids[j] < 0) continue;
      const float* row = rows + j * stride + begin;
      for (int64_t i = 0; i < size; ++i) total[i] += weights[j] * row[i];
    }
    if (type == Scalar::kBf16) {
      for (int64_t i = 0; i < size; ++i) y[begin + i] = float_to_bf16(total[i]);
    } else {
      for (int64_t i = 0; i < size; ++i) y[begin + i] = float_to_fp16(total[i]);
    }
  }
}

}  // namespace lk::LK_ISA

// Operations on whole rows before and after the matmuls: x becomes float, sums are scaled and
// biased, and the outputs of experts are combined.
#pragma once

#include "lk/kernels.h"
#include "lk/kernels/simd.h"

namespace lk::LK_ISA {

// Kernels::widen.
inline void widen(const void* x, Scalar type, int64_t n, float* values) {
  const auto* in = static_cast<const uint16_t*>(x);
  if (type == Scalar::kBf16) {
    for (int64_t i = 0; i < n; ++i) values[i] = bf16_to_float(in[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) values[i] = fp16_to_float(in[i]);
  }
}

// `lanes` sums from element i on, scaled and biased.
inline F32x16 finished(const Epilogue& epilogue, const float* sums, int64_t i, int64_t lanes) {
  F32x16 value = load_some(sums + i, lanes);
  if (epilogue.row_scale) value = value * load_some(epilogue.row_scale + i, lanes);
  value = value * epilogue.scale;
  if (epilogue.bias) value = value + load_some(epilogue.bias + i, lanes);
  return value;
}

// Kernels::finish.
inline void finish(const Sums& sums, int64_t n, bool stream, float* out) {
  if (stream && n % kLanes == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
    for (int64_t i = 0; i < n; i += kLanes) {
      store_past_caches(out + i, finished(sums.epilogue, sums.values, i, kLanes));
    }
  } else {
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t lanes = n - i < kLanes ? n - i : kLanes;
      store_some(out + i, finished(sums.epilogue, sums.values, i, lanes), lanes);
    }
  }
}

// Kernels::end_stream.
inline void end_stream() { store_fence(); }

// Whether no value is NaN or infinity. Compared as integers, the magnitudes of both are larger than
// those of all numbers.
inline bool all_finite(const uint16_t* values, int64_t n, Scalar type) {
  int16_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto magnitude = static_cast<int16_t>(values[i] & 0x7fff);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < (type == Scalar::kBf16 ? 0x7f80 : 0x7c00);
}

// Kernels::combine.
inline bool combine(const float* rows, int64_t stride, const float* weights, const int32_t* ids,
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
  // The rounded values are checked, because a sum may become infinite only when it is rounded. The
  // check is a pass of its own, 32 values at a time; the rows above take many times as long.
  return all_finite(y, n, type);
}

}  // namespace lk::LK_ISA

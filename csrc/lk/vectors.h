// What is done to whole rows around the products: x widened, sums scaled and biased, experts
// combined. Plain loops that the compiler vectorises.
#pragma once

#include "lk/kernels.h"
#include "lk/simd.h"

namespace lk::LK_ISA {

inline void widen(const void* x, Scalar type, int64_t n, float* values) {
  const auto* in = static_cast<const uint16_t*>(x);
  if (type == Scalar::kBf16) {
    for (int64_t i = 0; i < n; ++i) values[i] = bf16_to_float(in[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) values[i] = fp16_to_float(in[i]);
  }
}

inline void finish(const Epilogue& epilogue, int64_t n, const float* in, float* out) {
  const auto [row_scale, scale, bias] = epilogue;
  if (row_scale && bias) {
    for (int64_t i = 0; i < n; ++i) out[i] = in[i] * row_scale[i] * scale + bias[i];
  } else if (row_scale) {
    for (int64_t i = 0; i < n; ++i) out[i] = in[i] * row_scale[i] * scale;
  } else if (bias) {
    for (int64_t i = 0; i < n; ++i) out[i] = in[i] * scale + bias[i];
  } else if (scale != 1.0f || in != out) {
    for (int64_t i = 0; i < n; ++i) out[i] = in[i] * scale;
  }
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

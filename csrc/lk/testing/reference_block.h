// The expert block, computed one number at a time in double precision.
#pragma once

#include <cstdint>
#include <vector>

#include "lk/testing/random_layers.h"
#include "lk/testing/reference_values.h"

namespace lk::test_values {

inline double widen(Scalar type, uint16_t value) {
  return type == Scalar::kBf16 ? bf16_to_float(value) : fp16_to_float(value);
}

// The output of an expert for one token, with the router's weight.
inline std::vector<double> expert_output(const TestLayer& layer, int64_t expert,
                                         const std::vector<double>& x, double weight) {
  const LayerSpec& spec = layer.spec;
  const int64_t rows = spec.intermediate;
  std::vector<double> sums;  // [parts][rows]
  const auto multiply = [&](const TestMatrix& matrix, const Matrix& of) {
    const int64_t all = of.parts * rows;
    for (int64_t row = 0; row < all; ++row) {
      const double* w = matrix.values.data() + (expert * all + row) * spec.hidden;
      double sum = 0;
      for (int64_t i = 0; i < spec.hidden; ++i) sum += w[i] * x[i];
      if (spec.weight_on_input) sum *= weight;
      // The bias was de-interleaved with the rows.
      if (of.bias) sum += of.bias[expert * all + row];
      sums.push_back(sum);
    }
  };
  multiply(layer.w13, spec.w13);
  if (layer.w3) multiply(*layer.w3, spec.w3);
  const auto up = static_cast<int64_t>(sums.size()) - rows;
  std::vector<double> out;
  for (int64_t h = 0; h < spec.hidden; ++h) {
    const double* w = layer.w2.values.data() + (expert * spec.hidden + h) * rows;
    double sum = spec.w2.bias ? spec.w2.bias[expert * spec.hidden + h] : 0;
    for (int64_t i = 0; i < rows; ++i) {
      sum += w[i] * activated(spec.activation, sums[i], sums[up + i]);
    }
    out.push_back(spec.weight_on_input ? sum : sum * weight);
  }
  return out;
}

// The result of a batch with other ids, [tokens, topk].
inline std::vector<double> reference(const TestLayer& layer, const TestBatch& test,
                                     const std::vector<int32_t>& ids) {
  const int64_t hidden = layer.spec.hidden;
  const Batch& batch = test.batch;
  std::vector<double> y(batch.tokens * hidden, 0.0);
  for (int64_t slot = 0; slot < batch.tokens * batch.topk; ++slot) {
    if (ids[slot] < 0) continue;
    const int64_t token = slot / batch.topk;
    std::vector<double> x;
    for (int64_t i = 0; i < hidden; ++i) {
      x.push_back(widen(batch.type, test.x[token * hidden + i]));
    }
    const std::vector<double> out = expert_output(layer, ids[slot], x, test.weights[slot]);
    for (int64_t h = 0; h < hidden; ++h) y[token * hidden + h] += out[h];
  }
  return y;
}

}  // namespace lk::test_values

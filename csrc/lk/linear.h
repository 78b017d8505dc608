// A linear layer: a matrix of weights that all tokens are multiplied with.
#pragma once

#include <cstdint>

#include "lk/layer.h"
#include "lk/thread_pool.h"
#include "lk/workspace.h"

namespace lk {

struct LinearSpec {
  Matrix matrix;  // of one expert with one part
};

struct LinearBatch {
  Scalar type = Scalar::kBf16;  // of the elements of x and y
  int64_t tokens = 0;
  const void* x = nullptr;  // [tokens, k], rows x_stride elements apart
  int64_t x_stride = 0;
  void* y = nullptr;  // [tokens, rows]
};

// Puts a row-major matrix into the order that the kernels read, in place.
void order_linear(const LinearSpec& layer, ThreadPool& pool);

// y = x times the transposed matrix, plus the bias. Allocates only where the workspace grows.
void linear(const LinearSpec& layer, const LinearBatch& batch, const Kernels& kernels,
            ThreadPool& pool, Workspace& workspace);

}  // namespace lk

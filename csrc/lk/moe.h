// The expert block: group tokens by expert, gate and up, activation, down, combine.
#pragma once

#include <cstdint>

#include "lk/kernels.h"
#include "lk/thread_pool.h"
#include "lk/workspace.h"

namespace lk {

struct LayerSpec {
  Format format = Format::kBf16;
  Activation activation = Activation::kSilu;
  bool weight_on_input = false;  // the router's weight scales x instead of the expert's output
  int64_t experts = 0;
  int64_t hidden = 0;
  int64_t intermediate = 0;
  const void* w13 = nullptr;  // [experts, 2 * intermediate, hidden]: gate rows, then up rows
  const void* w2 = nullptr;   // [experts, hidden, intermediate]
};

struct Batch {
  Scalar type = Scalar::kBf16;  // of x and y
  int64_t tokens = 0;
  int64_t topk = 0;
  const void* x = nullptr;  // [tokens, hidden], rows x_stride elements apart
  int64_t x_stride = 0;
  const int32_t* ids = nullptr;    // [tokens, topk]; -1 skips the slot
  const int64_t* ids64 = nullptr;  // instead of ids
  const float* weights = nullptr;  // [tokens, topk]
  void* y = nullptr;               // [tokens, hidden]
};

// Computes y. Throws std::invalid_argument, before anything is computed, for an id that is no
// expert. Allocates only while the workspace grows.
void expert_block(const LayerSpec& layer, const Batch& batch, const Kernels& kernels,
                  ThreadPool& pool, Workspace& workspace);

}  // namespace lk

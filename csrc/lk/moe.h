// The expert block: group tokens by expert, gate and up, activation, down, combine.
#pragma once

#include <cstdint>
#include <vector>

#include "lk/layer.h"
#include "lk/thread_pool.h"
#include "lk/workspace.h"

namespace lk {

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
  int64_t first_row = 0;           // of y in the batch that the model runs, for the watch
};

// Where a row of y got its NaN or infinity from.
enum class FaultSource {
  kInput,   // x had one already
  kRouter,  // a router's weight
  kExpert,  // what an expert computed
  kSum,     // none of these: the sum over the experts is too large for y's type
};
struct Fault {
  int64_t row = 0;
  FaultSource source = FaultSource::kInput;
  int64_t expert = -1;  // of kRouter and kExpert

  bool operator==(const Fault&) const = default;
};

// Computes y. Returns the rows of y, in order, that are not finite. Throws std::invalid_argument,
// before anything is computed, for an id that is no expert. Allocates only while the workspace
// grows.
std::vector<Fault> expert_block(const LayerSpec& layer, const Batch& batch, const Kernels& kernels,
                                ThreadPool& pool, Workspace& workspace);

// Grows the workspace to what expert_block wants for up to so many tokens, whose ids are 32-bit.
void reserve_workspace(const LayerSpec& layer, int64_t tokens, int64_t topk, const Kernels& kernels,
                       ThreadPool& pool, Workspace& workspace);

}  // namespace lk

// The expert block of a MoE layer: it groups tokens by expert, multiplies with gate and up, applies
// the activation, multiplies with down, and combines the experts' outputs.
#pragma once

#include <cstdint>
#include <vector>

#include "lk/counters.h"
#include "lk/layer.h"
#include "lk/thread_pool.h"
#include "lk/workspace.h"

namespace lk {

struct Batch {
  Scalar type = Scalar::kBf16;  // of the elements of x and y
  int64_t tokens = 0;
  int64_t topk = 0;
  const void* x = nullptr;  // [tokens, hidden], rows x_stride elements apart
  int64_t x_stride = 0;
  const int32_t* ids = nullptr;    // [tokens, topk]; -1 skips the slot
  const int64_t* ids64 = nullptr;  // used instead of ids unless null
  const float* weights = nullptr;  // [tokens, topk]
  void* y = nullptr;               // [tokens, hidden]
  int64_t first_row = 0;           // the number of y's first row in the log of watch()
  Reason reason = Reason::kNoGpu;  // for the counters
  bool rest = false;               // the rest of a batch that the counters have: its time counts
};

// Where the NaN or infinity in a row of y comes from.
enum class FaultSource {
  kInput,   // from x
  kRouter,  // from a router's weight
  kExpert,  // from an expert's output
  kSum,     // from none of these: the sum over the experts is too large for y's type
};
struct Fault {
  int64_t row = 0;
  FaultSource source = FaultSource::kInput;
  int64_t expert = -1;  // for kRouter and kExpert

  bool operator==(const Fault&) const = default;
};

// Computes y. Returns the rows of y that are not finite, in order. Throws std::invalid_argument for
// an id that is no expert, before it computes anything. Allocates only where the workspace grows.
std::vector<Fault> expert_block(const LayerSpec& layer, const Batch& batch, const Kernels& kernels,
                                ThreadPool& pool, Workspace& workspace);

// Grows the workspace to what expert_block needs for up to so many tokens with 32-bit ids.
void reserve_workspace(const LayerSpec& layer, int64_t tokens, int64_t topk, const Kernels& kernels,
                       ThreadPool& pool, Workspace& workspace);

}  // namespace lk

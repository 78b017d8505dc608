// What the calls of a layer's experts did: the counts behind LvLLM's metrics.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace lk {

// Why a batch is computed here. lvllm/engine/counters.py has the same order.
enum class Reason {
  kNoGpu,   // there is no other place
  kSmall,   // it has fewer tokens than are worth a copy of the weights
  kOff,     // no batch of this layer is streamed
  kGraph,   // it comes from a graph of the GPU
  kShared,  // the GPU computes the batch's other experts at the same time
};
constexpr int kReasons = 5;
constexpr int kSizes = 12;

// Memory of the caller, which may be shared with processes that read it meanwhile. Every number
// only grows, and only the thread that holds the engine's mutex writes it. The tokens that each
// expert got, one number for each expert, follow this struct.
struct LayerCounters {
  struct {
    int64_t calls;
    int64_t tokens;
    int64_t nanoseconds;  // that the engine computed
  } of[kReasons];
  int64_t waited;  // nanoseconds that calls waited for others of this process to end
  int64_t reads;   // experts whose weights were read, pass by pass
  // Passes by their number of experts: up to 1, 2, 4, ... The last entry has no limit.
  int64_t passes[kSizes];

  int64_t* tokens_of_experts() { return reinterpret_cast<int64_t*>(this + 1); }

  void add_pass(int64_t experts) {
    reads += experts;
    const int size = experts > 1 ? std::bit_width(static_cast<uint64_t>(experts - 1)) : 0;
    ++passes[std::min(size, kSizes - 1)];
  }
};

}  // namespace lk

// Scratch memory that only grows, so that a call allocates nothing if it is no larger than an
// earlier one.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "lk/integers.h"
#include "lk/memory.h"

namespace lk {

// To be freed with std::free. Large arrays are in huge pages, of which the CPU knows the addresses
// of far more memory at a time: with 64 tokens and more, the expert block takes 2 to 4% less time.
inline void* allocate_scratch(int64_t bytes) {
  constexpr int64_t kCacheLine = 64;
  const int64_t page = bytes < kHugePage ? kCacheLine : kHugePage;
  bytes = round_up(bytes, page);
  void* const memory = std::aligned_alloc(page, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  // Where the kernel has no huge pages, small ones do.
  if (page == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
  return memory;
}

// An array of T that is aligned to cache lines. resize() loses the contents.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  T* resize(size_t count) {
    if (count > capacity_) {
      std::free(data_);
      capacity_ = 0;
      data_ = static_cast<T*>(allocate_scratch(static_cast<int64_t>(count * sizeof(T))));
      capacity_ = count;
    }
    return data_;
  }
  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t capacity_ = 0;
};

struct Workspace {
  // A slot is a pair of a token and one of its experts, with the number token * topk + choice.
  Scratch<int32_t> ids;           // ids that the caller gave as int64
  Scratch<int32_t> expert_begin;  // [experts + 1]: where an expert's slots begin in `slots`
  Scratch<int32_t> active;        // experts with at least one slot
  Scratch<int32_t> slots;         // slots in the order of their experts
  Scratch<char> acts;             // a packed row of x for each token
  Scratch<char> inter;            // a packed row of the intermediate for each slot, as in `slots`
  Scratch<float> partial;         // [slot][hidden]: the output of each expert
  Scratch<float> ones;            // weights to combine with, where the router's weights scale x
  Scratch<char> workers;          // the scratch memory of each worker
};

}  // namespace lk

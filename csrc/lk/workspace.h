// Scratch memory that only grows, so that a call allocates nothing once its size has been seen.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace lk {

// An array of T on a cache line of its own. resize() forgets the contents.
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
      const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
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
  // A slot is one (token, choice) pair, numbered token * topk + choice.
  Scratch<int32_t> ids;           // ids that came as int64
  Scratch<int32_t> expert_begin;  // [experts + 1] where an expert's slots begin in `slots`
  Scratch<int32_t> active;        // experts with at least one slot
  Scratch<int32_t> slots;         // slots in the order of their experts
  Scratch<char> acts;             // x as the kernels want it, a row a token
  Scratch<char> inter;            // activated intermediate, a row a slot in the order of `slots`
  Scratch<float> partial;         // [slot][hidden] output of each expert
  Scratch<float> ones;            // combine weights where the router's went into x
  Scratch<char> workers;          // what each worker needs for itself
};

}  // namespace lk

// Scratch memory that only grows, so that a call allocates nothing if it is no larger than an
// earlier one.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace lk {

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

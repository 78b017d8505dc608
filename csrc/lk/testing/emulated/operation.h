// An instruction as a function of memory, so that tests can compare several versions of it.
#pragma once

#include <cstdint>
#include <span>

namespace lk {

struct Operands {
  alignas(64) char a[64];
  alignas(64) char b[64];
  alignas(64) char c[64];
  uint64_t mask;
};

struct Operation {
  const char* name;
  // Writes the result, of at most 64 bytes, to `out`, which is aligned to 64 bytes.
  void (*run)(const Operands& operands, char* out);
};

// In the same order.
std::span<const Operation> emulated_operations();
std::span<const Operation> real_operations();

}  // namespace lk

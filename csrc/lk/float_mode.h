// The floating-point mode of the engine's threads.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace lk {

// While one exists, its thread rounds to nearest even and counts subnormal numbers, whatever mode
// the program has. A shared library that was linked with -ffast-math makes its thread, and those
// that are created later, treat subnormal numbers as zeros; then a token's result would depend on
// the thread that computes it, and on AVX2 small fp8 weights would be zeros (kernels/e4m3.h).
class ExactFloats {
 public:
#if defined(__x86_64__)
  ExactFloats() : before_(_mm_getcsr()) { _mm_setcsr(kDefault); }
  ~ExactFloats() { _mm_setcsr(before_); }
#else
  ExactFloats() {}  // Other CPUs have no such libraries.
#endif
  ExactFloats(const ExactFloats&) = delete;
  ExactFloats& operator=(const ExactFloats&) = delete;

#if defined(__x86_64__)
 private:
  static constexpr unsigned kDefault = 0x1f80;  // of MXCSR: all exceptions masked
  unsigned before_;
#endif
};

}  // namespace lk

// How the instructions on bf16 multiply: fused multiply-adds that round to nearest even, take
// denormals for zeros, and flush denormal results to zero.
#pragma once

#include <immintrin.h>

namespace lk {
namespace {

// Lets the CPU compute like that, and returns what MXCSR was before, to be restored by _mm_setcsr.
// The instructions on bf16 neither read nor change MXCSR.
inline unsigned flush_denormals() {
  constexpr unsigned kNoExceptions = 0x1f80;
  constexpr unsigned kDenormalsAreZeros = 0x40;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kNoExceptions | kDenormalsAreZeros | _MM_FLUSH_ZERO_ON);
  return before;
}

// sum + a * b and a + b. The compiler does not know that MXCSR matters to arithmetic, so it could
// move an intrinsic to where MXCSR is another. Of several NaNs the result is that of a, else of b,
// else of the sum.
inline void add_product(__m256& sum, __m256 a, __m256 b) {
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}
inline __m256 flushed_sum(__m256 a, __m256 b) {
  asm volatile("vaddps %1, %0, %0" : "+x"(a) : "x"(b));
  return a;
}

// The bf16 with odd and even numbers, as floats.
inline __m256 odd_bf16(__m256i pairs) {
  return (__m256)_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
}
inline __m256 even_bf16(__m256i pairs) { return (__m256)_mm256_slli_epi32(pairs, 16); }

}  // namespace
}  // namespace lk

// AVX-512 BF16 for the emulated build, see avx512.h.
#pragma once

#include "lk/testing/emulated/avx512_vbmi.h"
#include "lk/testing/emulated/flushed_products.h"

#define __AVX512BF16__ 1

namespace lk {
namespace {

// vdpbf16ps: the products of the odd bf16 are added first, then those of the even ones. Not
// inlined, because it is long and kernels repeat it a hundred times.
__attribute__((noinline)) inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  __m256 sums[2] = {half_of<__m256>(sum, 0), half_of<__m256>(sum, 1)};
  const unsigned before = flush_denormals();
  for (int n = 0; n < 2; ++n) {
    const auto x = half_of<__m256i>(a, n);
    const auto y = half_of<__m256i>(b, n);
    add_product(sums[n], odd_bf16(x), odd_bf16(y));
    add_product(sums[n], even_bf16(x), even_bf16(y));
  }
  _mm_setcsr(before);
  return joined<__m512>(sums[0], sums[1]);
}

// vcvtne2ps2bf16: the floats of b become the lower half. They are rounded to nearest even,
// denormals become zeros, and NaNs become quiet.
inline __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  const auto rounded = [](__m512 floats) {
    const auto bits = (Dwords16)floats;
    const Dwords16 magnitude = bits & 0x7fffffff;
    const Dwords16 nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Dwords16 quiet = bits >> 16 | 0x40;
    const Dwords16 zero = bits >> 16 & 0x8000;
    return magnitude < 0x00800000 ? zero : magnitude > 0x7f800000 ? quiet : nearest;
  };
  return (__m512bh)joined<__m512i>(_mm512_cvtepi32_epi16((__m512i)rounded(b)),
                                   _mm512_cvtepi32_epi16((__m512i)rounded(a)));
}

}  // namespace
}  // namespace lk

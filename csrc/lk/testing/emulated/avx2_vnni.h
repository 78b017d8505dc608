// AVX-VNNI for the emulated build, see avx512.h.
#pragma once

#include "lk/testing/emulated/vpdpbusd.h"

#define __AVXVNNI__ 1
#undef _mm_dpbusd_avx_epi32  // macros in some versions of GCC
#undef _mm256_dpbusd_avx_epi32
#undef _mm256_dpwssd_avx_epi32

namespace lk {
namespace {

inline __m128i _mm_dpbusd_avx_epi32(__m128i sum, __m128i a, __m128i b) {
  return vpdpbusd(sum, a, b);
}
inline __m256i _mm256_dpbusd_avx_epi32(__m256i sum, __m256i a, __m256i b) {
  return vpdpbusd(sum, a, b);
}

// vpdpwssd: two products of signed 16-bit integers are added to each lane, without saturation.
inline __m256i _mm256_dpwssd_avx_epi32(__m256i sum, __m256i a, __m256i b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

}  // namespace
}  // namespace lk

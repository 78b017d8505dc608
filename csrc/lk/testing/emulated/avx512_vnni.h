// AVX-512 VNNI for the emulated build, see avx512.h.
#pragma once

#include "lk/testing/emulated/avx512.h"
#include "lk/testing/emulated/vpdpbusd.h"

#define __AVX512VNNI__ 1
#undef _mm_dpbusd_epi32  // a macro in some versions of GCC

namespace lk {
namespace {

inline __m128i _mm_dpbusd_epi32(__m128i sum, __m128i a, __m128i b) { return vpdpbusd(sum, a, b); }
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  const auto part = [&](int n) {
    return vpdpbusd(half_of<__m256i>(sum, n), half_of<__m256i>(a, n), half_of<__m256i>(b, n));
  };
  return joined<__m512i>(part(0), part(1));
}

// vpdpwssd: two products of signed 16-bit integers are added to each lane, without saturation.
inline __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
  return (__m512i)((Dwords16)sum + (Dwords16)_mm512_madd_epi16(a, b));
}

}  // namespace
}  // namespace lk

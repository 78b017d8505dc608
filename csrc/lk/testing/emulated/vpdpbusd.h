// vpdpbusd by instructions of AVX2, for the emulated build.
#pragma once

#include <immintrin.h>

namespace lk {
namespace {

// Four products of unsigned and signed bytes are added to each lane, without saturation. Two of
// them fit into what vpmaddwd adds up: it multiplies the even bytes, then the odd ones.
inline __m256i vpdpbusd(__m256i sum, __m256i a, __m256i b) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xff)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
inline __m128i vpdpbusd(__m128i sum, __m128i a, __m128i b) {
  return _mm256_castsi256_si128(
      vpdpbusd(_mm256_castsi128_si256(sum), _mm256_castsi128_si256(a), _mm256_castsi128_si256(b)));
}

}  // namespace
}  // namespace lk

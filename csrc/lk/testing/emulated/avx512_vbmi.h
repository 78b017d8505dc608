// AVX-512 VBMI for the emulated build, see avx512.h.
#pragma once

#include "lk/testing/emulated/avx512_vnni.h"

#define __AVX512VBMI__ 1

namespace lk {
namespace {

// vpermi2b: 128 bytes, those of a, then those of b.
__attribute__((noinline)) inline __m512i _mm512_permutex2var_epi8(__m512i a, __m512i index,
                                                                  __m512i b) {
  return (__m512i)__builtin_shuffle((Bytes64)a, (Bytes64)b, (Bytes64)index);
}

// vpmultishiftqb: each byte has the eight bits of its quadword from the bit on that its byte of
// `begin` names, modulo 64.
inline __m512i _mm512_multishift_epi64_epi8(__m512i begin, __m512i a) {
  Bytes64 result;
  for (int i = 0; i < 64; ++i) {
    const uint64_t from = ((Quads8)a)[i / 8];
    const int bit = ((Bytes64)begin)[i] % 64;
    result[i] = static_cast<uint8_t>(bit == 0 ? from : from >> bit | from << (64 - bit));
  }
  return (__m512i)result;
}

}  // namespace
}  // namespace lk

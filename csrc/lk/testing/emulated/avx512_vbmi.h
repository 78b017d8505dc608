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

}  // namespace
}  // namespace lk

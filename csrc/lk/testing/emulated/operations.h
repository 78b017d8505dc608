// All instructions that the emulated build emulates for vectors, with the intrinsics of
// <immintrin.h> or with those that emulate them, which depends on the unit that includes this.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "lk/testing/emulated/operation.h"

namespace lk {
namespace {

inline __m512i integers(const char* p) { return _mm512_load_si512(p); }
inline __m512 floats(const char* p) { return _mm512_loadu_ps(p); }
inline __m128i quarter(const char* p) {
  return _mm_load_si128(reinterpret_cast<const __m128i*>(p));
}
inline __m256i half(const char* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}
template <class Result>
inline void put(char* out, Result result) {
  std::memcpy(out, &result, sizeof(result));
}

constexpr Operation kOperations[] = {
    {"set1_ps",
     [](const Operands& o, char* out) {
       float value;
       std::memcpy(&value, o.a, sizeof(value));
       put(out, _mm512_set1_ps(value));
     }},
    {"set1_epi8", [](const Operands& o, char* out) { put(out, _mm512_set1_epi8(o.a[0])); }},
    {"set1_epi16",
     [](const Operands& o, char* out) { put(out, _mm512_set1_epi16(static_cast<short>(o.mask))); }},
    {"set1_epi32",
     [](const Operands& o, char* out) { put(out, _mm512_set1_epi32(static_cast<int>(o.mask))); }},
    {"maskz_set1_epi8",
     [](const Operands& o, char* out) { put(out, _mm512_maskz_set1_epi8(o.mask, o.a[0])); }},
    {"setr_epi32",
     [](const Operands&, char* out) {
       put(out, _mm512_setr_epi32(0, -1, 2, -3, 4, -5, 6, -7, 8, -9, 10, -11, 12, -13, 14, -15));
     }},
    {"broadcast_i32x4",
     [](const Operands& o, char* out) { put(out, _mm512_broadcast_i32x4(quarter(o.a))); }},
    {"broadcast_i64x4",
     [](const Operands& o, char* out) { put(out, _mm512_broadcast_i64x4(half(o.a))); }},
    {"maskz_loadu_epi8",
     [](const Operands& o, char* out) { put(out, _mm512_maskz_loadu_epi8(o.mask, o.a)); }},
    {"maskz_loadu_epi32",
     [](const Operands& o, char* out) {
       put(out, _mm512_maskz_loadu_epi32(static_cast<__mmask16>(o.mask), o.a));
     }},
    {"storeu_si512", [](const Operands& o, char* out) { _mm512_storeu_si512(out, integers(o.a)); }},
    {"stream_ps", [](const Operands& o,
                     char* out) { _mm512_stream_ps(reinterpret_cast<float*>(out), floats(o.a)); }},
    {"mul_ps",
     [](const Operands& o, char* out) { put(out, _mm512_mul_ps(floats(o.a), floats(o.b))); }},
    {"fmadd_ps",
     [](const Operands& o, char* out) {
       put(out, _mm512_fmadd_ps(floats(o.a), floats(o.b), floats(o.c)));
     }},
    {"cvtph_ps", [](const Operands& o, char* out) { put(out, _mm512_cvtph_ps(half(o.a))); }},
    {"cvtps_epi32",
     [](const Operands& o, char* out) { put(out, _mm512_cvtps_epi32(floats(o.a))); }},
    {"reduce_add_ps",
     [](const Operands& o, char* out) { put(out, _mm512_reduce_add_ps(floats(o.a))); }},
    {"add_epi8",
     [](const Operands& o, char* out) { put(out, _mm512_add_epi8(integers(o.a), integers(o.b))); }},
    {"add_epi16", [](const Operands& o,
                     char* out) { put(out, _mm512_add_epi16(integers(o.a), integers(o.b))); }},
    {"madd_epi16", [](const Operands& o,
                      char* out) { put(out, _mm512_madd_epi16(integers(o.a), integers(o.b))); }},
    {"maddubs_epi16",
     [](const Operands& o, char* out) {
       put(out, _mm512_maddubs_epi16(integers(o.a), integers(o.b)));
     }},
    {"or_si512",
     [](const Operands& o, char* out) { put(out, _mm512_or_si512(integers(o.a), integers(o.b))); }},
    {"ternarylogic_epi32 0xec",
     [](const Operands& o, char* out) {
       put(out, _mm512_ternarylogic_epi32(integers(o.a), integers(o.b), integers(o.c), 0xec));
     }},
    {"ternarylogic_epi32 0xf4",
     [](const Operands& o, char* out) {
       put(out, _mm512_ternarylogic_epi32(integers(o.a), integers(o.b), integers(o.c), 0xf4));
     }},
    {"ternarylogic_epi32 0xf8",
     [](const Operands& o, char* out) {
       put(out, _mm512_ternarylogic_epi32(integers(o.a), integers(o.b), integers(o.c), 0xf8));
     }},
    {"slli_epi16 7",
     [](const Operands& o, char* out) { put(out, _mm512_slli_epi16(integers(o.a), 7)); }},
    {"srli_epi16 4",
     [](const Operands& o, char* out) { put(out, _mm512_srli_epi16(integers(o.a), 4)); }},
    {"srli_epi16 16",
     [](const Operands& o, char* out) { put(out, _mm512_srli_epi16(integers(o.a), 16)); }},
    {"srli_epi32 16",
     [](const Operands& o, char* out) { put(out, _mm512_srli_epi32(integers(o.a), 16)); }},
    {"cmple_epu8_mask",
     [](const Operands& o, char* out) {
       put(out, _mm512_cmple_epu8_mask(integers(o.a), integers(o.b)));
     }},
    {"cvtepi32_epi16",
     [](const Operands& o, char* out) { put(out, _mm512_cvtepi32_epi16(integers(o.a))); }},
    {"cvtsepi32_epi16",
     [](const Operands& o, char* out) { put(out, _mm512_cvtsepi32_epi16(integers(o.a))); }},
    {"i32gather_epi32",
     [](const Operands& o, char* out) {
       put(out, _mm512_i32gather_epi32((__m512i)(integers(o.a) & 15), o.b, 4));
     }},
    {"shuffle_epi8",
     [](const Operands& o, char* out) {
       put(out, _mm512_shuffle_epi8(integers(o.a), integers(o.b)));
     }},
    {"shuffle_ps 0x88",
     [](const Operands& o, char* out) {
       put(out, _mm512_shuffle_ps(floats(o.a), floats(o.b), 0x88));
     }},
    {"shuffle_ps 0xdd",
     [](const Operands& o, char* out) {
       put(out, _mm512_shuffle_ps(floats(o.a), floats(o.b), 0xdd));
     }},
    {"inserti64x4 1",
     [](const Operands& o, char* out) {
       put(out, _mm512_inserti64x4(_mm512_castsi256_si512(half(o.a)), half(o.b), 1));
     }},
    {"unpacklo_epi8",
     [](const Operands& o, char* out) {
       put(out, _mm512_unpacklo_epi8(integers(o.a), integers(o.b)));
     }},
    {"unpackhi_epi8",
     [](const Operands& o, char* out) {
       put(out, _mm512_unpackhi_epi8(integers(o.a), integers(o.b)));
     }},
    {"unpacklo_epi16",
     [](const Operands& o, char* out) {
       put(out, _mm512_unpacklo_epi16(integers(o.a), integers(o.b)));
     }},
    {"unpackhi_epi16",
     [](const Operands& o, char* out) {
       put(out, _mm512_unpackhi_epi16(integers(o.a), integers(o.b)));
     }},
    {"permutexvar_epi16",
     [](const Operands& o, char* out) {
       put(out, _mm512_permutexvar_epi16(integers(o.a), integers(o.b)));
     }},
    {"permutex2var_epi16",
     [](const Operands& o, char* out) {
       put(out, _mm512_permutex2var_epi16(integers(o.a), integers(o.b), integers(o.c)));
     }},
    {"permutexvar_epi32",
     [](const Operands& o, char* out) {
       put(out, _mm512_permutexvar_epi32(integers(o.a), integers(o.b)));
     }},
    {"permutex2var_epi8",
     [](const Operands& o, char* out) {
       put(out, _mm512_permutex2var_epi8(integers(o.a), integers(o.b), integers(o.c)));
     }},
    {"multishift_epi64_epi8",
     [](const Operands& o, char* out) {
       put(out, _mm512_multishift_epi64_epi8(integers(o.a), integers(o.b)));
     }},
    {"dpbusd_epi32",
     [](const Operands& o, char* out) {
       put(out, _mm512_dpbusd_epi32(integers(o.a), integers(o.b), integers(o.c)));
     }},
    {"dpbusd_epi32 of 128 bits",
     [](const Operands& o, char* out) {
       put(out, _mm_dpbusd_epi32(quarter(o.a), quarter(o.b), quarter(o.c)));
     }},
    {"dpwssd_epi32",
     [](const Operands& o, char* out) {
       put(out, _mm512_dpwssd_epi32(integers(o.a), integers(o.b), integers(o.c)));
     }},
    {"cvtne2ps_pbh",
     [](const Operands& o, char* out) { put(out, _mm512_cvtne2ps_pbh(floats(o.a), floats(o.b))); }},
    {"dpbf16_ps",
     [](const Operands& o, char* out) {
       put(out, _mm512_dpbf16_ps(floats(o.a), (__m512bh)integers(o.b), (__m512bh)integers(o.c)));
     }},
};

}  // namespace
}  // namespace lk

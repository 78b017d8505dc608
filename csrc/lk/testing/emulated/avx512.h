// The AVX-512 intrinsics that the kernels use (F, BW, DQ, VL), for CPUs with AVX2.
//
// The emulated build (LK_EMULATE) includes this before the source of a kernel. The functions hide
// <immintrin.h>'s own of the same names, because the kernels are in namespace lk, and they have
// internal linkage, so that instruction sets share no symbol. Results are those of Intel's Software
// Developer's Manual, volume 2, bit by bit. Most of these instructions do the same as one of AVX2,
// to twice as many lanes; the others are written with GCC's vectors, which need no instruction of
// their own.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// Only now: <immintrin.h> would take these for compiler options.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#undef _mm512_setr_epi32   // a macro
#undef _mm512_inserti64x4  // macros without optimisation
#undef _mm512_shuffle_ps
#undef _mm512_i32gather_epi32

namespace lk {
namespace {

// The lanes of a vector.
typedef uint8_t Bytes64 __attribute__((vector_size(64)));
typedef uint16_t Words32 __attribute__((vector_size(64)));
typedef uint32_t Dwords16 __attribute__((vector_size(64)));
typedef uint64_t Quads8 __attribute__((vector_size(64)));

// Half 0 or 1 of a vector of 64 bytes, and a vector of two halves.
template <class Half, class Whole>
inline Half half_of(const Whole& whole, int n) {
  static_assert(sizeof(Whole) == 2 * sizeof(Half));
  Half half;
  std::memcpy(&half, reinterpret_cast<const char*>(&whole) + n * sizeof(half), sizeof(half));
  return half;
}
template <class Whole, class Half>
inline Whole joined(const Half& low, const Half& high) {
  static_assert(sizeof(Whole) == 2 * sizeof(Half));
  Whole whole;
  std::memcpy(&whole, &low, sizeof(low));
  std::memcpy(reinterpret_cast<char*>(&whole) + sizeof(low), &high, sizeof(high));
  return whole;
}

// What an instruction of AVX2 makes of both halves.
template <class Function>
inline __m512i by_halves(__m512i a, __m512i b, Function instruction) {
  return joined<__m512i>(instruction(half_of<__m256i>(a, 0), half_of<__m256i>(b, 0)),
                         instruction(half_of<__m256i>(a, 1), half_of<__m256i>(b, 1)));
}

// Ends the process where an instruction would fault.
[[noreturn]] inline void fault(const char* instruction, const char* why) {
  std::fprintf(stderr, "emulated %s: %s\n", instruction, why);
  std::abort();
}
inline void check_aligned(const char* instruction, const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) fault(instruction, "not aligned to 64 bytes");
}

// Constants, loads and stores.

inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512 _mm512_set1_ps(float value) { return value - __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512i _mm512_set1_epi8(char value) {
  return (__m512i)(Bytes64{} + static_cast<uint8_t>(value));
}
inline __m512i _mm512_set1_epi16(short value) {
  return (__m512i)(Words32{} + static_cast<uint16_t>(value));
}
inline __m512i _mm512_set1_epi32(int value) {
  return (__m512i)(Dwords16{} + static_cast<uint32_t>(value));
}
inline __m512i _mm512_maskz_set1_epi8(__mmask64 mask, char value) {
  Bytes64 result = {};
  for (int i = 0; i < 64; ++i) {
    if (mask >> i & 1) result[i] = static_cast<uint8_t>(value);
  }
  return (__m512i)result;
}
template <class... Lanes>
inline __m512i _mm512_setr_epi32(Lanes... lanes) {
  static_assert(sizeof...(lanes) == 16);
  return (__m512i)Dwords16{static_cast<uint32_t>(lanes)...};
}
inline __m512i _mm512_broadcast_i32x4(__m128i a) {
  const __m256i twice = _mm256_broadcastsi128_si256(a);
  return joined<__m512i>(twice, twice);
}
inline __m512i _mm512_broadcast_i64x4(__m256i a) { return joined<__m512i>(a, a); }
// The upper half is undefined.
inline __m512i _mm512_castsi256_si512(__m256i a) { return joined<__m512i>(a, __m256i{}); }

template <class Vector>
inline Vector loaded(const void* p) {
  Vector vector;
  std::memcpy(&vector, p, sizeof(vector));
  return vector;
}
inline __m512 _mm512_loadu_ps(const void* p) { return loaded<__m512>(p); }
inline __m512i _mm512_load_si512(const void* p) {
  check_aligned("vmovdqa32", p);
  return loaded<__m512i>(p);
}
inline void _mm512_storeu_si512(void* p, __m512i a) { std::memcpy(p, &a, sizeof(a)); }
inline void _mm512_stream_ps(void* p, __m512 a) {
  check_aligned("vmovntps", p);
  _mm256_stream_ps(static_cast<float*>(p), half_of<__m256>(a, 0));
  _mm256_stream_ps(static_cast<float*>(p) + 8, half_of<__m256>(a, 1));
}

// Lanes of `Size` bytes; those that are not in the mask become zero, and their memory is not
// touched.
template <int kSize>
inline __m512i loaded_with_zeros(uint64_t mask, const void* p) {
  if (mask == ~uint64_t{0} >> (64 - 64 / kSize)) return loaded<__m512i>(p);
  __m512i result = {};
  for (int i = 0; i < 64 / kSize; ++i) {
    if ((mask >> i & 1) == 0) continue;
    std::memcpy(reinterpret_cast<char*>(&result) + i * kSize,
                static_cast<const char*>(p) + i * kSize, kSize);
  }
  return result;
}
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* p) {
  return loaded_with_zeros<1>(mask, p);
}
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* p) {
  return loaded_with_zeros<4>(mask, p);
}

// Floats.

inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const auto fma = [&](int n) {
    return _mm256_fmadd_ps(half_of<__m256>(a, n), half_of<__m256>(b, n), half_of<__m256>(c, n));
  };
  return joined<__m512>(fma(0), fma(1));
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
  return joined<__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                        _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
inline __m512i _mm512_cvtps_epi32(__m512 a) {
  return joined<__m512i>(_mm256_cvtps_epi32(half_of<__m256>(a, 0)),
                         _mm256_cvtps_epi32(half_of<__m256>(a, 1)));
}
// No single instruction. The sum is in GCC's order: halves, quarters, and so on.
inline float _mm512_reduce_add_ps(__m512 a) {
  const __m256 eight = half_of<__m256>(a, 1) + half_of<__m256>(a, 0);
  const __m128 four = _mm256_extractf128_ps(eight, 1) + _mm256_castps256_ps128(eight);
  return (four[2] + four[0]) + (four[3] + four[1]);
}

// Integers.

inline __m512i _mm512_add_epi8(__m512i a, __m512i b) { return (__m512i)((Bytes64)a + (Bytes64)b); }
inline __m512i _mm512_add_epi16(__m512i a, __m512i b) { return (__m512i)((Words32)a + (Words32)b); }
inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  return by_halves(a, b, [](__m256i x, __m256i y) { return _mm256_madd_epi16(x, y); });
}
inline __m512i _mm512_maddubs_epi16(__m512i a, __m512i b) {
  return by_halves(a, b, [](__m256i x, __m256i y) { return _mm256_maddubs_epi16(x, y); });
}
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
// The logical function of three bits whose value for the bits a, b and c is bit 4a + 2b + c.
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int function) {
  __m512i result = {};
  for (int bits = 0; bits < 8; ++bits) {
    if ((function >> bits & 1) == 0) continue;
    result |= (bits & 4 ? a : ~a) & (bits & 2 ? b : ~b) & (bits & 1 ? c : ~c);
  }
  return result;
}
inline __m512i _mm512_slli_epi16(__m512i a, unsigned count) {
  return (__m512i)(count < 16 ? (Words32)a << count : Words32{});
}
inline __m512i _mm512_srli_epi16(__m512i a, unsigned count) {
  return (__m512i)(count < 16 ? (Words32)a >> count : Words32{});
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned count) {
  return (__m512i)(count < 32 ? (Dwords16)a >> count : Dwords16{});
}
inline __mmask64 _mm512_cmple_epu8_mask(__m512i a, __m512i b) {
  __mmask64 mask = 0;
  for (int i = 0; i < 64; ++i) mask |= __mmask64{((Bytes64)a)[i] <= ((Bytes64)b)[i]} << i;
  return mask;
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  typedef uint16_t Words16 __attribute__((vector_size(32)));
  return (__m256i) __builtin_convertvector((Dwords16)a, Words16);
}
inline __m256i _mm512_cvtsepi32_epi16(__m512i a) {  // saturates
  const __m256i pairs = _mm256_packs_epi32(half_of<__m256i>(a, 0), half_of<__m256i>(a, 1));
  return _mm256_permute4x64_epi64(pairs, 0xd8);
}

// Permutations.

inline __m512i _mm512_i32gather_epi32(__m512i index, const void* base, int scale) {
  Dwords16 result;
  for (int i = 0; i < 16; ++i) {
    uint32_t value;
    const auto lane = static_cast<int32_t>(((Dwords16)index)[i]);
    std::memcpy(&value, static_cast<const char*>(base) + int64_t{lane} * scale, sizeof(value));
    result[i] = value;
  }
  return (__m512i)result;
}

inline __m512i _mm512_shuffle_epi8(__m512i a, __m512i b) {
  return by_halves(a, b, [](__m256i x, __m256i y) { return _mm256_shuffle_epi8(x, y); });
}
inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int from) {
  __m512 result;
  for (int i = 0; i < 16; ++i) {
    result[i] = (i % 4 < 2 ? a : b)[i / 4 * 4 + (from >> i % 4 * 2 & 3)];
  }
  return result;
}
inline __m512i _mm512_inserti64x4(__m512i a, __m256i b, int half) {
  return half == 0 ? joined<__m512i>(b, half_of<__m256i>(a, 1))
                   : joined<__m512i>(half_of<__m256i>(a, 0), b);
}
inline __m512i _mm512_unpacklo_epi8(__m512i a, __m512i b) {
  return by_halves(a, b, [](__m256i x, __m256i y) { return _mm256_unpacklo_epi8(x, y); });
}
inline __m512i _mm512_unpackhi_epi8(__m512i a, __m512i b) {
  return by_halves(a, b, [](__m256i x, __m256i y) { return _mm256_unpackhi_epi8(x, y); });
}
inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) {
  return by_halves(a, b, [](__m256i x, __m256i y) { return _mm256_unpacklo_epi16(x, y); });
}
inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) {
  return by_halves(a, b, [](__m256i x, __m256i y) { return _mm256_unpackhi_epi16(x, y); });
}
// Only the low bits of an index count, as they do for these instructions. Not inlined: the vectors
// have 16 to 64 lanes, each of which is moved by itself.
__attribute__((noinline)) inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
  return (__m512i)__builtin_shuffle((Words32)a, (Words32)index);
}
__attribute__((noinline)) inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i index,
                                                                   __m512i b) {
  return (__m512i)__builtin_shuffle((Words32)a, (Words32)b, (Words32)index);
}
__attribute__((noinline)) inline __m512i _mm512_permutexvar_epi32(__m512i index, __m512i a) {
  return (__m512i)__builtin_shuffle((Dwords16)a, (Dwords16)index);
}

}  // namespace
}  // namespace lk

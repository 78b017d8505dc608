// Instructions that GCC 12 does not use well by itself, as inline assembly.
//
// With the intrinsics, whose vector types are not those of simd.h, it moves sums to other registers
// and back; and if it may choose between a register and memory for activations, it keeps more of
// them in registers than there are. LK_EMULATE takes the intrinsics, which that build emulates.
#pragma once

#include "lk/kernels/simd.h"

namespace lk::LK_ISA {

#if defined(__AVX2__)

// Four bytes of memory in every lane of one vector. Where there are 32 registers, `volatile` keeps
// GCC 12 from loading them early and once for all rows, for which it has no registers.
inline __attribute__((always_inline)) IntVector broadcast_bits(const char* p) {
#if defined(__AVX512F__) && !defined(LK_EMULATE)
  IntVector bits;
  asm volatile("vpbroadcastd %1, %0" : "=v"(bits) : "m"(*reinterpret_cast<const int32_t*>(p)));
  return bits;
#else
  return IntVector{} + *reinterpret_cast<const int32_t*>(p);
#endif
}

// Hides from the compiler what a sum is made of. Otherwise GCC 12 adds up the products of several
// steps before they reach the sum, and stores them for want of registers; and sums that begin with
// the same number begin as copies of one register in the inner loop.
inline __attribute__((always_inline)) IntVector opaque(IntVector sum) {
#if !defined(LK_EMULATE)
  asm("" : "+v"(sum));
#endif
  return sum;
}

#endif

// Of AVX-512 or of AVX2; and with it vpdpwssd.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define LK_VPDPBUSD
#endif

#if defined(__AVX512F__)

// sum + w * the float at p.
inline __attribute__((always_inline)) FloatVector add_product(FloatVector sum, FloatVector w,
                                                              const char* p) {
#if defined(LK_EMULATE)
  return _mm512_fmadd_ps(w, (FloatVector)broadcast_bits(p), sum);
#else
  asm("vfmadd231ps %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(w), "m"(*reinterpret_cast<const float*>(p)));
  return sum;
#endif
}

#elif defined(__AVX2__)

// sum + w * a.
inline __attribute__((always_inline)) FloatVector add_product(FloatVector sum, FloatVector w,
                                                              FloatVector a) {
#if defined(LK_EMULATE)
  return _mm256_fmadd_ps(w, a, sum);
#else
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(w), "x"(a));
  return sum;
#endif
}

#endif
#if defined(__AVX512VNNI__)

// sum + the products of four unsigned bytes of each lane of w and four signed bytes, of a or at p.
inline __attribute__((always_inline)) IntVector add_byte_products(IntVector sum, IntVector w,
                                                                  IntVector a) {
#if defined(LK_EMULATE)
  return (IntVector)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)a);
#else
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(a));
  return sum;
#endif
}
inline __attribute__((always_inline)) IntVector add_byte_products(IntVector sum, IntVector w,
                                                                  const char* p) {
#if defined(LK_EMULATE)
  return add_byte_products(sum, w, broadcast_bits(p));
#else
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(w), "m"(*reinterpret_cast<const int32_t*>(p)));
  return sum;
#endif
}

inline __m128i add_byte_products(__m128i sum, __m128i w, __m128i a) {
  return _mm_dpbusd_epi32(sum, w, a);
}

// sum + the products of two signed 16-bit integers of each lane of w and two of a or at p.
inline __attribute__((always_inline)) IntVector add_short_products(IntVector sum, IntVector w,
                                                                   IntVector a) {
#if defined(LK_EMULATE)
  return (IntVector)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, (__m512i)a);
#else
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(a));
  return sum;
#endif
}
inline __attribute__((always_inline)) IntVector add_short_products(IntVector sum, IntVector w,
                                                                   const char* p) {
#if defined(LK_EMULATE)
  return add_short_products(sum, w, broadcast_bits(p));
#else
  asm("vpdpwssd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(w), "m"(*reinterpret_cast<const int32_t*>(p)));
  return sum;
#endif
}

#elif defined(__AVXVNNI__)

// The same with 32 bytes, from registers only.
inline __attribute__((always_inline)) IntVector add_byte_products(IntVector sum, IntVector w,
                                                                  IntVector a) {
#if defined(LK_EMULATE)
  return (IntVector)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)a);
#else
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(a));
  return sum;
#endif
}
inline __attribute__((always_inline)) IntVector add_short_products(IntVector sum, IntVector w,
                                                                   IntVector a) {
#if defined(LK_EMULATE)
  return (IntVector)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)a);
#else
  asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(a));
  return sum;
#endif
}

// The same with 16 bytes.
inline __m128i add_byte_products(__m128i sum, __m128i w, __m128i a) {
  return _mm_dpbusd_avx_epi32(sum, w, a);
}

#elif defined(__AVX2__)

// The same for weights up to 129: with signed bytes from -127 to 127, their two products fit into
// 16 bits.
inline __attribute__((always_inline)) IntVector add_byte_products(IntVector sum, IntVector w,
                                                                  IntVector a) {
#if defined(__AVX512F__)
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)w, (__m512i)a);
  const auto fours = (IntVector)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#else
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)a);
  const auto fours = (IntVector)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
  return sum + fours;
}
inline __m128i add_byte_products(__m128i sum, __m128i w, __m128i a) {
  return _mm_add_epi32(sum, _mm_madd_epi16(_mm_maddubs_epi16(w, a), _mm_set1_epi16(1)));
}

#endif
#if defined(__AVX512BF16__)

// sum + the products of two bf16 of each lane of w and two at p.
inline __attribute__((always_inline)) FloatVector add_bf16_products(FloatVector sum, __m512bh w,
                                                                    const char* p) {
#if defined(LK_EMULATE)
  return _mm512_dpbf16_ps(sum, w, (__m512bh)broadcast_bits(p));
#else
  asm("vdpbf16ps %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(w), "m"(*reinterpret_cast<const int32_t*>(p)));
  return sum;
#endif
}

#endif

#if defined(__AMX_TILE__)

// AMX's tile registers, 0 to 7. GCC 12's intrinsics do not say that they read memory, so the
// compiler could store it too late.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};  // at most 64
  uint8_t rows[16] = {};        // at most 16
};
inline void configure_tiles(const TileConfig& config) {
#if defined(LK_EMULATE)
  emulated::ldtilecfg(&config);
#else
  asm volatile("ldtilecfg %0" : : "m"(config));
#endif
}
// Without it, the system would save 8 KiB of tiles whenever the thread is interrupted.
inline void release_tiles() {
#if defined(LK_EMULATE)
  emulated::tilerelease();
#else
  asm volatile("tilerelease");
#endif
}
template <int kTile>
inline __attribute__((always_inline)) void zero_tile() {
#if defined(LK_EMULATE)
  emulated::tilezero(kTile);
#else
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
#endif
}
// The rows of a tile are `stride` bytes apart in memory.
template <int kTile>
inline __attribute__((always_inline)) void load_tile(const char* p, int64_t stride) {
#if defined(LK_EMULATE)
  emulated::tileloadd(kTile, p, stride);
#else
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(p), "r"(stride) : "memory");
#endif
}
template <int kTile>
inline __attribute__((always_inline)) void store_tile(char* p, int64_t stride) {
#if defined(LK_EMULATE)
  emulated::tilestored(kTile, p, stride);
#else
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(p), "r"(stride) : "memory");
#endif
}
// Tile C += tile A * tile B, of signed bytes or of bf16.
template <int kC, int kA, int kB>
inline __attribute__((always_inline)) void add_byte_tiles() {
#if defined(LK_EMULATE)
  emulated::tdpbssd(kC, kA, kB);
#else
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
#endif
}
template <int kC, int kA, int kB>
inline __attribute__((always_inline)) void add_bf16_tiles() {
#if defined(LK_EMULATE)
  emulated::tdpbf16ps(kC, kA, kB);
#else
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
#endif
}

#endif

}  // namespace lk::LK_ISA

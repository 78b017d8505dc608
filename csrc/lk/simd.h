// 16 floats in the vectors of the instruction set that this file is compiled for. Included only by
// the kernels_*.cpp, each of which sets LK_ISA: the namespace keeps the linker from taking one
// instruction set's copy of an inline function for another's.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lk::LK_ISA {

inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }

inline float bf16_to_float(uint16_t value) { return float_of(uint32_t{value} << 16); }

// Round to nearest even; a NaN stays one.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

// Shifted into place a half is a float too small by 2^112; that also makes denormals right. All
// ones in the exponent (infinity, NaN) are put back by hand. Branch-free, so that it vectorises.
inline float fp16_to_float(uint16_t value) {
  const uint32_t magnitude = (value & 0x7fffu) << 13;
  const uint32_t special = (value & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
  const uint32_t sign = (value & 0x8000u) << 16;
  return float_of(bits_of(float_of(magnitude) * 0x1p112f) | special | sign);
}

// Round to nearest even, overflow to infinity.
inline uint16_t float_to_fp16(float value) {
  const uint32_t sign = bits_of(value) & 0x80000000u;
  const uint32_t bits = bits_of(value) ^ sign;
  // Adding 0.5 aligns a denormal's last bit with the float's, and the addition does the rounding.
  const uint32_t denormal = bits_of(float_of(bits) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (bits - 0x38000000u + 0xfff + ((bits >> 13) & 1)) >> 13;
  const uint32_t finite = bits < 0x38800000u ? denormal : normal;
  const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>((bits >= 0x477ff000u ? special : finite) | (sign >> 16));
}

#if defined(__AVX512F__)

constexpr int kFloatChains = 2;
struct F32x16 {
  __m512 v;
};
inline F32x16 zeros() { return {_mm512_setzero_ps()}; }
inline F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F32x16 load_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline F32x16 load_fp16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline float sum(F32x16 a) { return _mm512_reduce_add_ps(a.v); }
// Four sums at once, in the same order of additions as sum(): lanes 8 apart, then 4, 2 and 1. Costs
// a third of four separate ones, which at K = 768 took as long as half the multiplications.
inline void sum4(F32x16 a, F32x16 b, F32x16 c, F32x16 d, float* out) {
  const __m512 ab =
      _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44), _mm512_shuffle_f32x4(a.v, b.v, 0xee));
  const __m512 cd =
      _mm512_add_ps(_mm512_shuffle_f32x4(c.v, d.v, 0x44), _mm512_shuffle_f32x4(c.v, d.v, 0xee));
  __m512 all =
      _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4e));
  all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xb1));
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, all)));
}

#elif defined(__AVX2__)

constexpr int kFloatChains = 2;
struct F32x16 {
  __m256 v[2];
};
inline F32x16 zeros() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
inline F32x16 load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
inline __m256 load8_bf16(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 load8_fp16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F32x16 load_bf16(const uint16_t* p) { return {{load8_bf16(p), load8_bf16(p + 8)}}; }
inline F32x16 load_fp16(const uint16_t* p) { return {{load8_fp16(p), load8_fp16(p + 8)}}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
}
inline F32x16 add(F32x16 a, F32x16 b) {
  return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
}
inline float sum(F32x16 a) {
  const __m256 eight = _mm256_add_ps(a.v[0], a.v[1]);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

inline void sum4(F32x16 a, F32x16 b, F32x16 c, F32x16 d, float* out) {
  out[0] = sum(a);
  out[1] = sum(b);
  out[2] = sum(c);
  out[3] = sum(d);
}

#else

// The compiler's own vectors of four, which every target has (SSE2, NEON).
typedef float Float4 __attribute__((vector_size(16)));

constexpr int kFloatChains = 1;
struct F32x16 {
  Float4 v[4];
};
inline F32x16 zeros() { return {}; }
inline F32x16 load(const float* p) {
  F32x16 a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
inline F32x16 load_bf16(const uint16_t* p) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = bf16_to_float(p[i]);
  return load(values);
}
inline F32x16 load_fp16(const uint16_t* p) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = fp16_to_float(p[i]);
  return load(values);
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  F32x16 result;
  for (int i = 0; i < 4; ++i) result.v[i] = a.v[i] * b.v[i] + c.v[i];
  return result;
}
inline F32x16 add(F32x16 a, F32x16 b) {
  F32x16 result;
  for (int i = 0; i < 4; ++i) result.v[i] = a.v[i] + b.v[i];
  return result;
}
inline float sum(F32x16 a) {
  const Float4 four = (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

inline void sum4(F32x16 a, F32x16 b, F32x16 c, F32x16 d, float* out) {
  out[0] = sum(a);
  out[1] = sum(b);
  out[2] = sum(c);
  out[3] = sum(d);
}

#endif

}  // namespace lk::LK_ISA

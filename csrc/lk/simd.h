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

// The widest vectors that the compiler may use here; 64 bytes are 4, 2 or 1 of them.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kVectors = 64 / kVectorBytes;
constexpr int kVectorLanes = kVectorBytes / 4;

typedef float FloatVector __attribute__((vector_size(kVectorBytes), may_alias));
typedef uint32_t UintVector __attribute__((vector_size(kVectorBytes), may_alias));
typedef int32_t IntVector __attribute__((vector_size(kVectorBytes), may_alias));
typedef float FloatMemory __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef uint32_t UintMemory __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));

struct F32x16 {
  FloatVector v[kVectors];
};
struct U32x16 {
  UintVector v[kVectors];
};

inline F32x16 zeros() { return {}; }
inline F32x16 broadcast(float value) {
  F32x16 a;
  for (auto& v : a.v) v = value - FloatVector{};  // x - 0 is x, so nothing is computed
  return a;
}
inline F32x16 load(const float* p) {
  F32x16 a;
  for (int i = 0; i < kVectors; ++i) {
    a.v[i] = *reinterpret_cast<const FloatMemory*>(p + i * kVectorLanes);
  }
  return a;
}
inline void store(float* p, F32x16 a) {
  for (int i = 0; i < kVectors; ++i) *reinterpret_cast<FloatMemory*>(p + i * kVectorLanes) = a.v[i];
}
// The first `lanes` of them, and zeros.
inline F32x16 load_some(const float* p, int64_t lanes) {
  if (lanes == 16) return load(p);
  F32x16 a = {};
  std::memcpy(&a, p, lanes * sizeof(float));
  return a;
}
inline void store_some(float* p, F32x16 a, int64_t lanes) {
  if (lanes == 16) return store(p, a);
  std::memcpy(p, &a, lanes * sizeof(float));
}
// To p, on a cache line, without reading the line before: for what is read after more than the
// caches hold.
inline void store_past_caches(float* p, F32x16 a) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, a.v[0]);
#elif defined(__AVX2__)
  for (int i = 0; i < kVectors; ++i) _mm256_stream_ps(p + i * kVectorLanes, a.v[i]);
#else
  store(p, a);
#endif
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  F32x16 result;
  for (int i = 0; i < kVectors; ++i) {
#if defined(__AVX512F__)
    result.v[i] = _mm512_fmadd_ps(a.v[i], b.v[i], c.v[i]);
#elif defined(__AVX2__)
    result.v[i] = _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i]);
#else
    result.v[i] = a.v[i] * b.v[i] + c.v[i];
#endif
  }
  return result;
}
inline F32x16 operator+(F32x16 a, F32x16 b) {
  for (int i = 0; i < kVectors; ++i) a.v[i] = a.v[i] + b.v[i];
  return a;
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
  for (int i = 0; i < kVectors; ++i) a.v[i] = a.v[i] - b.v[i];
  return a;
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
  for (int i = 0; i < kVectors; ++i) a.v[i] = a.v[i] * b.v[i];
  return a;
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
  for (int i = 0; i < kVectors; ++i) a.v[i] = a.v[i] / b.v[i];
  return a;
}
inline F32x16 operator+(F32x16 a, float b) { return a + broadcast(b); }
inline F32x16 operator-(F32x16 a, float b) { return a - broadcast(b); }
inline F32x16 operator*(F32x16 a, float b) { return a * broadcast(b); }
// The smaller and the larger one; a where it is not a number.
inline F32x16 min(F32x16 a, float b) {
  for (auto& v : a.v) v = v > b - FloatVector{} ? b - FloatVector{} : v;
  return a;
}
inline F32x16 max(F32x16 a, float b) {
  for (auto& v : a.v) v = v < b - FloatVector{} ? b - FloatVector{} : v;
  return a;
}
// if_negative where `sign` is below zero, `otherwise` elsewhere.
inline F32x16 select_negative(F32x16 sign, F32x16 if_negative, F32x16 otherwise) {
  for (int i = 0; i < kVectors; ++i) {
    otherwise.v[i] = sign.v[i] < FloatVector{} ? if_negative.v[i] : otherwise.v[i];
  }
  return otherwise;
}
// a * 2^n, n being the low bits of `shifted`, a number in [2^23, 2^24).
inline F32x16 scale_exponent(F32x16 a, F32x16 shifted) {
  for (int i = 0; i < kVectors; ++i) {
    a.v[i] = (FloatVector)((UintVector)a.v[i] + ((UintVector)shifted.v[i] << 23));
  }
  return a;
}

// Some of the 16 lanes, from the first: the rows of a tile's last vector.
#if defined(__AVX512F__)
using LaneMask = __mmask16;
inline LaneMask first_lanes(int64_t n) { return static_cast<LaneMask>((1u << n) - 1); }
#else
using LaneMask = int64_t;
inline LaneMask first_lanes(int64_t n) { return n; }
#endif

// Four bytes of each of the masked lanes; zeros in the others, whose memory is not touched.
inline U32x16 load_units(const char* p, LaneMask lanes) {
#if defined(__AVX512F__)
  return {(UintVector)_mm512_maskz_loadu_epi32(lanes, p)};
#else
  U32x16 a = {};
  if (lanes == 16) {
    for (int i = 0; i < kVectors; ++i) {
      a.v[i] = *reinterpret_cast<const UintMemory*>(p + i * kVectorBytes);
    }
  } else {
    std::memcpy(&a, p, lanes * 4);
  }
  return a;
#endif
}

inline U32x16 operator&(U32x16 a, uint32_t b) {
  for (auto& v : a.v) v &= b;
  return a;
}
inline U32x16 operator<<(U32x16 a, int n) {
  for (auto& v : a.v) v <<= n;
  return a;
}
inline U32x16 operator>>(U32x16 a, int n) {
  for (auto& v : a.v) v >>= n;
  return a;
}
inline F32x16 as_float(U32x16 a) {
  F32x16 result;
  for (int i = 0; i < kVectors; ++i) result.v[i] = (FloatVector)a.v[i];
  return result;
}
// Byte `n` of each lane as a signed integer, as float.
inline F32x16 signed_byte(U32x16 a, int n) {
  F32x16 result;
  for (int i = 0; i < kVectors; ++i) {
    const IntVector value = ((IntVector)a.v[i] << (24 - 8 * n)) >> 24;
    result.v[i] = __builtin_convertvector(value, FloatVector);
  }
  return result;
}

// Half `n` (0 the low one) of each lane from fp16 to float.
inline F32x16 half_to_float(U32x16 a, int n) {
  F32x16 result;
  const U32x16 halves = (a >> 16 * n) & 0xffff;
  for (int i = 0; i < kVectors; ++i) {
#if defined(__AVX512F__)
    result.v[i] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)halves.v[i]));
#elif defined(__AVX2__)
    const auto all = (__m256i)halves.v[i];
    result.v[i] = _mm256_cvtph_ps(
        _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
    for (int lane = 0; lane < kVectorLanes; ++lane) {
      result.v[i][lane] = fp16_to_float(static_cast<uint16_t>(halves.v[i][lane]));
    }
#endif
  }
  return result;
}

// Byte `n` of each lane from e4m3fn (OCP 8-bit floating point: bias 7, no infinity, all ones NaN).
inline F32x16 e4m3_to_float(U32x16 a, int n) {
  F32x16 result;
  const U32x16 bytes = a >> 8 * n;
  for (int i = 0; i < kVectors; ++i) {
    const UintVector magnitude = bytes.v[i] & 0x7f;
    const FloatVector subnormal =
        __builtin_convertvector((IntVector)magnitude, FloatVector) * 0x1p-9f;
    UintVector bits = magnitude < 8 ? (UintVector)subnormal : (magnitude << 20) + (120u << 23);
    bits = magnitude == 0x7f ? UintVector{} + 0x7fc00000u : bits;
    result.v[i] = (FloatVector)(bits | (bytes.v[i] & 0x80) << 24);
  }
  return result;
}

// table[low four bits of each lane].
inline F32x16 lookup(const float* table, U32x16 index) {
  F32x16 result;
#if defined(__AVX512F__)
  result.v[0] = _mm512_permutexvar_ps((__m512i)index.v[0], _mm512_loadu_ps(table));
#elif defined(__AVX2__)
  const __m256 low = _mm256_loadu_ps(table);
  const __m256 high = _mm256_loadu_ps(table + 8);
  for (int i = 0; i < kVectors; ++i) {
    const auto at = (__m256i)index.v[i];
    result.v[i] =
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at),
                         _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));  // by bit 3
  }
#else
  for (int i = 0; i < kVectors; ++i) {
    for (int lane = 0; lane < kVectorLanes; ++lane) {
      result.v[i][lane] = table[index.v[i][lane] & 15];
    }
  }
#endif
  return result;
}

}  // namespace lk::LK_ISA

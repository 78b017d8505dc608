// 16 floats, in the vectors of the instruction set that this header is compiled for.
//
// All headers in this folder are included only by its units (avx2.cpp and its like), each of which
// sets LK_ISA. The namespace keeps the linker from using one instruction set's copy of an inline
// function for another's; for the same reason nothing here calls std::min and its like.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "lk/kernels/float16.h"

namespace lk::LK_ISA {

inline __attribute__((always_inline)) constexpr int64_t min(int64_t a, int64_t b) {
  return b < a ? b : a;
}
inline __attribute__((always_inline)) constexpr int64_t max(int64_t a, int64_t b) {
  return a < b ? b : a;
}

// The width of the widest vectors that the compiler may use; 16 floats take 4, 2 or 1 of them.
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
struct I32x16 {
  IntVector v[kVectors];
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
// Loads the first `lanes` floats; the other lanes become zero.
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
// Stores to p, which is aligned to a cache line, without first reading the line into the caches.
// This is for data that will have left the caches before it is read.
inline void store_past_caches(float* p, F32x16 a) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, a.v[0]);
#elif defined(__AVX2__)
  for (int i = 0; i < kVectors; ++i) _mm256_stream_ps(p + i * kVectorLanes, a.v[i]);
#else
  store(p, a);
#endif
}
// Orders stores past the caches before later stores, as other stores are without it.
inline void store_fence() {
#if defined(__AVX2__)
  _mm_sfence();
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
// The smaller and the larger number; where a is NaN, the result is NaN.
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
// a * 2^n, where n is in the low bits of `shifted`, a number in [2^23, 2^24).
inline F32x16 scale_exponent(F32x16 a, F32x16 shifted) {
  for (int i = 0; i < kVectors; ++i) {
    a.v[i] = (FloatVector)((UintVector)a.v[i] + ((UintVector)shifted.v[i] << 23));
  }
  return a;
}

// The first n of the 16 lanes: the rows in the last vector of a tile.
#if defined(__AVX512F__)
using LaneMask = __mmask16;
inline LaneMask first_lanes(int64_t n) { return static_cast<LaneMask>((1u << n) - 1); }
#else
using LaneMask = int64_t;
inline LaneMask first_lanes(int64_t n) { return n; }
#endif

// Loads four bytes for each of the masked lanes. The others become zero, and their memory is not
// touched.
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

// Loads two bytes for each of the masked lanes, as load_units does.
inline U32x16 load_half_units(const char* p, LaneMask lanes) {
  typedef uint16_t Halves __attribute__((vector_size(kVectorLanes * 2)));
  Halves halves[kVectors] = {};
  // A copy of known size is a load, one of unknown size a call.
#if defined(__AVX512F__)
  if (lanes == 0xffff) {
    std::memcpy(halves, p, sizeof(halves));
  } else {
    std::memcpy(halves, p, __builtin_popcount(lanes) * 2);
  }
#else
  if (lanes == 16) {
    std::memcpy(halves, p, sizeof(halves));
  } else {
    std::memcpy(halves, p, lanes * 2);
  }
#endif
  U32x16 a;
  for (int i = 0; i < kVectors; ++i) a.v[i] = __builtin_convertvector(halves[i], UintVector);
  return a;
}

inline U32x16 operator+(U32x16 a, uint32_t b) {
  for (auto& v : a.v) v += b;
  return a;
}
inline U32x16 operator-(U32x16 a, U32x16 b) {
  for (int i = 0; i < kVectors; ++i) a.v[i] -= b.v[i];
  return a;
}
inline U32x16 operator^(U32x16 a, U32x16 b) {
  for (int i = 0; i < kVectors; ++i) a.v[i] ^= b.v[i];
  return a;
}
inline U32x16 operator&(U32x16 a, uint32_t b) {
  for (auto& v : a.v) v &= b;
  return a;
}
inline U32x16 operator|(U32x16 a, U32x16 b) {
  for (int i = 0; i < kVectors; ++i) a.v[i] |= b.v[i];
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
// Byte `n` of each lane, a signed integer, as float.
inline F32x16 signed_byte(U32x16 a, int n) {
  F32x16 result;
  for (int i = 0; i < kVectors; ++i) {
    const IntVector value = ((IntVector)a.v[i] << (24 - 8 * n)) >> 24;
    result.v[i] = __builtin_convertvector(value, FloatVector);
  }
  return result;
}

// Half `n` of each lane (0 is the low one), converted from fp16.
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

// table[i], where i is the low four bits of each lane.
inline F32x16 lookup(const float* table, U32x16 index) {
  F32x16 result;
  for (int i = 0; i < kVectors; ++i) {
    for (int lane = 0; lane < kVectorLanes; ++lane) {
      result.v[i][lane] = table[index.v[i][lane] & 15];
    }
  }
  return result;
}

// Shuffles the bytes of each lane: byte b of a lane becomes its byte from[b], or 0 where that is
// 128.
inline __attribute__((always_inline)) U32x16 shuffle_lanes(U32x16 a, uint32_t from) {
#if defined(__AVX2__)
  const auto lane = [&](uint32_t n) { return static_cast<int>(from + n * 0x04040404u); };
#endif
  for (auto& v : a.v) {
#if defined(__AVX512F__)
    const __m128i at = _mm_setr_epi32(lane(0), lane(1), lane(2), lane(3));
    v = (UintVector)_mm512_shuffle_epi8((__m512i)v, _mm512_broadcast_i32x4(at));
#elif defined(__AVX2__)
    // As a constant of 32 bytes: GCC makes one of a broadcast of 16 in two instructions, each time.
    const __m256i at = _mm256_setr_epi32(lane(0), lane(1), lane(2), lane(3),  //
                                         lane(0), lane(1), lane(2), lane(3));
    v = (UintVector)_mm256_shuffle_epi8((__m256i)v, at);
#else
    UintVector shuffled{};
    for (int b = 0; b < 4; ++b) {
      const uint32_t byte = from >> 8 * b & 0xff;
      if (byte < 4) shuffled |= (v >> 8 * byte & 0xff) << 8 * b;
    }
    v = shuffled;
#endif
  }
  return a;
}
// Bytes n and n + 1 of each lane, as 16 bits.
inline U32x16 two_bytes(U32x16 a, int n) { return shuffle_lanes(a, 0x80018000u + n * 0x00010001u); }

// Replaces byte b of each lane by `from` less that byte where byte `byte` of the lane in `bits` has
// the bit that is set in byte b of `places`.
inline __attribute__((always_inline)) U32x16 subtract_bytes_from(int from, U32x16 a, U32x16 bits,
                                                                 int byte, uint32_t places) {
  typedef uint8_t ByteVector __attribute__((vector_size(kVectorBytes)));
  const U32x16 four = shuffle_lanes(bits, byte * 0x01010101u);
  for (int i = 0; i < kVectors; ++i) {
    const auto place = (ByteVector)(UintVector{} + places);
    const auto from_a = static_cast<uint8_t>(from) - (ByteVector)a.v[i];
    a.v[i] = (UintVector)(((ByteVector)four.v[i] & place) != 0 ? from_a : (ByteVector)a.v[i]);
  }
  return a;
}

inline I32x16 as_integers(U32x16 a) {
  I32x16 result;
  for (int i = 0; i < kVectors; ++i) result.v[i] = (IntVector)a.v[i];
  return result;
}
inline F32x16 to_float(I32x16 a) {
  F32x16 result;
  for (int i = 0; i < kVectors; ++i) result.v[i] = __builtin_convertvector(a.v[i], FloatVector);
  return result;
}
// Of numbers below 2^31: any CPU converts signed ones by one instruction.
inline F32x16 to_float(U32x16 a) { return to_float(as_integers(a)); }

// table[i] for each byte i, which is below 16.
inline U32x16 lookup_bytes(const void* table, U32x16 index) {
#if defined(__AVX2__)
  const __m128i values = _mm_load_si128(static_cast<const __m128i*>(table));
  for (auto& v : index.v) {
#if defined(__AVX512F__)
    v = (UintVector)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), (__m512i)v);
#else
    v = (UintVector)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), (__m256i)v);
#endif
  }
#else
  uint8_t bytes[64];
  std::memcpy(bytes, &index, sizeof(bytes));
  for (uint8_t& byte : bytes) byte = static_cast<const uint8_t*>(table)[byte];
  std::memcpy(&index, bytes, sizeof(bytes));
#endif
  return index;
}

#if defined(__AVX2__)

// Both 16-bit halves of each lane, as signed integers: shifted left, then right with their sign.
inline I32x16 shift_halves(U32x16 a, int left, int right) {
  typedef int16_t ShortVector __attribute__((vector_size(kVectorBytes)));
  I32x16 result;
  for (int i = 0; i < kVectors; ++i) {
    result.v[i] = (IntVector)(((ShortVector)a.v[i] << left) >> right);
  }
  return result;
}

// Bytes 1 and 3 of each lane, as 16-bit integers.
inline U32x16 odd_bytes(U32x16 a) {
  typedef uint16_t ShortVector __attribute__((vector_size(kVectorBytes)));
  for (auto& v : a.v) v = (UintVector)((ShortVector)v >> 8);
  return a;
}

inline U32x16 operator^(U32x16 a, uint32_t b) {
  for (auto& v : a.v) v ^= b;
  return a;
}

#endif

}  // namespace lk::LK_ISA

// Loads the scales of a group of weights, one for each row of a tile, as floats.
#pragma once

#include <cstring>

#include "lk/kernels/arithmetic.h"
#include "lk/kernels/e4m3.h"
#include "lk/kernels/formats/int4.h"

namespace lk::LK_ISA {

constexpr int64_t kScalePrefetchBytes = 1024;

#if defined(__AVX512VBMI__)

// Loads up to 64 codes of 8 bits. Four consecutive codes go to the place where their four floats
// will be, because bytes and then words are interleaved within each 16 bytes of a vector: first the
// lower and upper bytes of bf16, then those with zeros.
inline __m512i load_codes(const uint8_t* codes, int64_t rows) {
  const __mmask64 present = rows == kTileRows ? ~__mmask64{0} : (__mmask64{1} << rows) - 1;
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi8(present, codes));
}
// Stores 64 bf16 as floats.
inline void store_bf16(__m512i first, __m512i second, float* out) {
  const __m512i zero = _mm512_setzero_si512();
  _mm512_storeu_si512(out, _mm512_unpacklo_epi16(zero, first));
  _mm512_storeu_si512(out + kLanes, _mm512_unpackhi_epi16(zero, first));
  _mm512_storeu_si512(out + 2 * kLanes, _mm512_unpacklo_epi16(zero, second));
  _mm512_storeu_si512(out + 3 * kLanes, _mm512_unpackhi_epi16(zero, second));
}

// 2^(code - 127); a code of all ones is NaN. The code is the float's exponent, except for codes 0
// and 255: there one bit of the fraction makes 2^-127 out of 0, and NaN out of infinity.
inline void e8m0_to_floats(const uint8_t* scale, int64_t rows, float* out) {
  const __m512i codes = load_codes(scale, rows);
  const __m512i one = _mm512_set1_epi8(1);
  const __mmask64 ends = _mm512_cmple_epu8_mask(_mm512_add_epi8(codes, one), one);
  const __m512i fraction = _mm512_maskz_set1_epi8(ends, 0x40);
  const __m512i zero = _mm512_setzero_si512();
  store_bf16(_mm512_or_si512(_mm512_slli_epi16(_mm512_unpacklo_epi8(codes, zero), 7),
                             _mm512_unpacklo_epi8(fraction, zero)),
             _mm512_or_si512(_mm512_slli_epi16(_mm512_unpackhi_epi8(codes, zero), 7),
                             _mm512_unpackhi_epi8(fraction, zero)),
             out);
}

// The tables take a fifth of the instructions that shifts and comparisons take. Those were 20% of
// all instructions with nvfp4, whose groups have 16 weights.
inline void e4m3_to_floats(const uint8_t* scale, int64_t rows, float* out) {
  const auto [lower, upper] = e4m3_to_bf16_bytes(load_codes(scale, rows));
  store_bf16(_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper), out);
}

#else

// 2^(code - 127); a code of all ones is NaN.
inline void e8m0_to_floats(const uint8_t* scale, int64_t rows, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const uint32_t code = scale[r];
    const uint32_t bits = code == 0 ? 0x00400000u : code << 23;
    out[r] = float_of(code == 255 ? 0x7fc00000u : bits);
  }
}

inline void e4m3_to_floats(const uint8_t* scale, int64_t rows, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const uint32_t code = scale[r];
    const uint32_t magnitude = code & 0x7f;
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f;
    const uint32_t normal = (magnitude << 20) + (120u << 23);
    uint32_t bits = magnitude < 8 ? bits_of(subnormal) : normal;
    bits = magnitude == 0x7f ? 0x7fc00000u : bits;
    out[r] = float_of(bits | (code & 0x80) << 24);
  }
}

#endif

// The scales of a group of weights, out[row]. Not inlined: each call in a matmul would copy it.
__attribute__((noinline)) inline void load_scales(const MatmulArgs& a, int64_t group, float* out) {
  const int64_t rows = a.rows;
  const int64_t at = group * rows;
  // Scales are a second stream from memory beside the weights, and the next tile's scales follow
  // this tile's.
  const auto prefetched = [&](const auto* scale) {
    const char* from = reinterpret_cast<const char*>(scale) + kScalePrefetchBytes;
    constexpr int64_t kBytes = kTileRows * sizeof(*scale);
    for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(from + line);
    return scale;
  };
  switch (a.scale_type) {
    case ScaleType::kNone:
      for (int64_t r = 0; r < kTileRows; ++r) out[r] = 1.0f;
      return;
    case ScaleType::kBf16: {
      const auto* scale = prefetched(static_cast<const uint16_t*>(a.scale) + at);
      for (int64_t r = 0; r < rows; ++r) out[r] = bf16_to_float(scale[r]);
      return;
    }
    case ScaleType::kFp16: {
      const auto* scale = prefetched(static_cast<const uint16_t*>(a.scale) + at);
      for (int64_t r = 0; r < rows; ++r) out[r] = fp16_to_float(scale[r]);
      return;
    }
    case ScaleType::kFloat:
      std::memcpy(out, prefetched(static_cast<const float*>(a.scale) + at), rows * sizeof(float));
      return;
    case ScaleType::kE8m0:
      return e8m0_to_floats(prefetched(static_cast<const uint8_t*>(a.scale) + at), rows, out);
    case ScaleType::kE4m3:
      return e4m3_to_floats(prefetched(static_cast<const uint8_t*>(a.scale) + at), rows, out);
    case ScaleType::kInBlocks:
      return;  // The format loads them: kOwnScales.
    case ScaleType::kFloatBlocks: {
      const float first = static_cast<const float*>(a.scale)[group];
      for (int64_t r = 0; r < kTileRows; ++r) out[r] = first;
      for (int64_t r = a.block_end; r < kTileRows; ++r) out[r] = a.next_block_scale[group];
      return;
    }
  }
}

// What the zero points of a group lower its weights by, once these are multiplied by their scales.
inline void load_zero_points(const MatmulArgs& a, int64_t group, const float* scale, float* low) {
  const uint8_t* zero = a.zero + group * a.rows;
  for (int64_t r = 0; r < a.rows; ++r) {
    low[r] = scale[r] * (static_cast<float>(zero[r]) - kInt4ZeroPoint);
  }
}

}  // namespace lk::LK_ISA

// Conversions of single numbers between float and the two 16-bit formats, bf16 and fp16.
#pragma once

#include <cstdint>

namespace lk::LK_ISA {

inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }

inline float bf16_to_float(uint16_t value) { return float_of(uint32_t{value} << 16); }

// Rounds to nearest even; a NaN stays a NaN.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

// Shifted into place, the bits of a half are a float that is too small by 2^112. Multiplying by
// 2^112 also makes denormals right. Only an exponent of all ones (infinity and NaN) has to be set
// again afterwards. The function has no branches, so that the compiler can vectorise it.
inline float fp16_to_float(uint16_t value) {
  const uint32_t magnitude = (value & 0x7fffu) << 13;
  const uint32_t special = (value & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
  const uint32_t sign = (value & 0x8000u) << 16;
  return float_of(bits_of(float_of(magnitude) * 0x1p112f) | special | sign);
}

// Rounds to nearest even; what is too large becomes infinity.
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

}  // namespace lk::LK_ISA

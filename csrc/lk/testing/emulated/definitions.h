// What instructions on floats and bf16 do to one number, and operands to try them with.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <random>

namespace lk::definitions {

using Random = std::mt19937_64;

template <class T>
T lane(const char* p, int64_t i) {
  T value;
  std::memcpy(&value, p + i * sizeof(T), sizeof(T));
  return value;
}

inline float quiet(float nan) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(nan) | 0x00400000);
}
// The NaN that the CPU makes of invalid operands.
inline float indefinite() { return std::bit_cast<float>(0xffc00000u); }

// a * b + c with the CPU's choice among several NaNs, rounded once.
inline float fused(float a, float b, float c) {
  for (float operand : {a, b, c}) {
    if (std::isnan(operand)) return quiet(operand);
  }
  const float result = std::fma(a, b, c);
  return std::isnan(result) ? indefinite() : result;
}
inline float flushed(float value) {
  return std::abs(value) < std::numeric_limits<float>::min() ? std::copysign(0.0f, value) : value;
}
inline float flushed_fused(float a, float b, float c) {
  return flushed(fused(flushed(a), flushed(b), flushed(c)));
}
inline float widened(uint16_t bf16) { return std::bit_cast<float>(uint32_t{bf16} << 16); }

// Fills an operand of `count` times four bytes with bits of one kind: any, moderate floats or bf16,
// or special values among them.
inline void fill(char* operand, int count, Random& random) {
  const auto below = [&](uint64_t n) { return random() % n; };
  const uint64_t kind = below(6);
  std::normal_distribution<float> normal;
  for (int i = 0; i < count; ++i) {
    auto bits = static_cast<uint32_t>(random());
    if (kind == 1) bits = std::bit_cast<uint32_t>(normal(random) * (i % 2 ? 1e3f : 1.0f));
    if (kind == 2) {
      const uint32_t low = std::bit_cast<uint32_t>(normal(random)) >> 16;
      bits = (std::bit_cast<uint32_t>(normal(random)) & 0xffff0000) | low;
    }
    if (kind >= 3 && below(2) == 0) {
      // Zero, denormals, the least and the largest numbers, infinity, both kinds of NaN, ties of
      // the rounding to bf16, and extreme integers.
      constexpr uint32_t kSpecial[] = {0,          1,          0x007fffff, 0x00800000, 0x7f7fffff,
                                       0x7f800000, 0x7fc01234, 0x7f801234, 0x3f808000, 0x3f818000,
                                       0x7f7f8000, 0x7fff7fff, 0x80008000, 0x7f7f7f7f, 0x80808080,
                                       0x00800080, 0x007f8000, 0x0080ffff, 0x7f80ff80, 0x1f801f80};
      bits = kSpecial[below(std::size(kSpecial))] ^ static_cast<uint32_t>(below(2) << 31);
    }
    // Products of small numbers, which become denormal.
    if (kind == 5 && below(2) == 0) bits = (bits & 0x807fffff) | 0x20000000;
    std::memcpy(operand + 4 * i, &bits, 4);
  }
}

}  // namespace lk::definitions

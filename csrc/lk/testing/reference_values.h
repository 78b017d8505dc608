// Random weights in every format, and their values, computed one at a time in double precision. The
// kernels share only the conversions in float16.h with this, and those have a test of their own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "lk/blocks.h"
#include "lk/codebooks.h"
#include "lk/kernels.h"
#include "lk/layer.h"

#define LK_ISA test_values
#include "lk/kernels/float16.h"

namespace lk::test_values {

// Those without blocks, whose weights have a code and a scale each.
constexpr Format kAllFormats[] = {
    Format::kBf16,           Format::kFp16,         Format::kFp8,
    Format::kInt8,           Format::kInt8Act8,     Format::kInt8Groups,
    Format::kInt8GroupsAct8, Format::kInt4,         Format::kInt4Act8,
    Format::kInt4Zero,       Format::kInt4ZeroAct8, Format::kFp4,
    Format::kFp4Act8};
constexpr Format kBlockFormats[] = {
    Format::kQ2K,    Format::kQ2KAct8,    Format::kQ3K,    Format::kQ3KAct8,
    Format::kQ4K,    Format::kQ4KAct8,    Format::kQ5K,    Format::kQ5KAct8,
    Format::kQ6K,    Format::kQ6KAct8,    Format::kQ41,    Format::kQ41Act8,
    Format::kQ50,    Format::kQ50Act8,    Format::kQ51,    Format::kQ51Act8,
    Format::kIq4Nl,  Format::kIq4NlAct8,  Format::kIq4Xs,  Format::kIq4XsAct8,
    Format::kIq1S,   Format::kIq1SAct8,   Format::kIq1M,   Format::kIq1MAct8,
    Format::kIq2Xxs, Format::kIq2XxsAct8, Format::kIq2Xs,  Format::kIq2XsAct8,
    Format::kIq2S,   Format::kIq2SAct8,   Format::kIq3Xxs, Format::kIq3XxsAct8,
    Format::kIq3S,   Format::kIq3SAct8};

inline std::string name_of(Format format) {
  constexpr const char* kNames[] = {"bf16",
                                    "fp16",
                                    "fp8",
                                    "int8",
                                    "int8_act8",
                                    "int8_groups",
                                    "int8_groups_act8",
                                    "int4",
                                    "int4_act8",
                                    "int4_zero",
                                    "int4_zero_act8",
                                    "fp4",
                                    "fp4_act8",
                                    "q2_k",
                                    "q2_k_act8",
                                    "q3_k",
                                    "q3_k_act8",
                                    "q4_k",
                                    "q4_k_act8",
                                    "q5_k",
                                    "q5_k_act8",
                                    "q6_k",
                                    "q6_k_act8",
                                    "q4_1",
                                    "q4_1_act8",
                                    "q5_0",
                                    "q5_0_act8",
                                    "q5_1",
                                    "q5_1_act8",
                                    "iq4_nl",
                                    "iq4_nl_act8",
                                    "iq4_xs",
                                    "iq4_xs_act8",
                                    "iq1_s",
                                    "iq1_s_act8",
                                    "iq1_m",
                                    "iq1_m_act8",
                                    "iq2_xxs",
                                    "iq2_xxs_act8",
                                    "iq2_xs",
                                    "iq2_xs_act8",
                                    "iq2_s",
                                    "iq2_s_act8",
                                    "iq3_xxs",
                                    "iq3_xxs_act8",
                                    "iq3_s",
                                    "iq3_s_act8"};
  return kNames[static_cast<int>(format)];
}
inline bool has_zero_points(Format format) {
  return format == Format::kInt4Zero || format == Format::kInt4ZeroAct8;
}
inline bool is_int4(Format format) {
  return format >= Format::kInt4 && format <= Format::kInt4ZeroAct8;
}
// Whether the format has groups of 32, 64 or 128 weights, or whole rows.
inline bool has_groups(Format format) {
  return format == Format::kInt8Groups || format == Format::kInt8GroupsAct8 || is_int4(format);
}
inline bool is_act8(Format format) {
  return format == Format::kInt8Act8 || format == Format::kInt8GroupsAct8 ||
         format == Format::kInt4Act8 || format == Format::kInt4ZeroAct8 ||
         format == Format::kFp4Act8 ||
         (block_layout(format) != nullptr && name_of(format).ends_with("_act8"));
}
inline int64_t row_bytes(Format format, int64_t k) {
  const BlockLayout* const blocks = block_layout(format);
  return blocks ? k / blocks->weights * blocks->block_bytes : k * kUnitBytes / unit_weights(format);
}
inline int64_t bytes_of(ScaleType type) {
  Matrix matrix;
  matrix.scale_type = type;
  return matrix.scale_bytes();
}

// The value of a float with `fraction` bits after `exponent` bits, without infinities and NaNs.
inline double small_float(uint32_t code, int exponent, int fraction, int bias) {
  const uint32_t low = code & ((1u << fraction) - 1);
  const int high = static_cast<int>(code >> fraction & ((1u << exponent) - 1));
  const double sign = code >> (exponent + fraction) & 1 ? -1 : 1;
  return sign * (high == 0 ? std::ldexp(low, 1 - bias - fraction)
                           : std::ldexp(low + (1u << fraction), high - bias - fraction));
}
inline double e4m3(uint32_t code) { return (code & 127) == 127 ? NAN : small_float(code, 4, 3, 7); }
inline double e8m0(uint32_t code) {
  return code == 255 ? NAN : std::ldexp(1.0, static_cast<int>(code) - 127);
}

template <class T>
T element(const void* array, int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(array) + index * sizeof(T), sizeof(T));
  return value;
}

// The value of a code of a format; for int4, with a zero point of 8.
inline double code_value(Format format, uint32_t code) {
  switch (format) {
    case Format::kBf16:
      return bf16_to_float(static_cast<uint16_t>(code));
    case Format::kFp16:
      return fp16_to_float(static_cast<uint16_t>(code));
    case Format::kFp8:
      return e4m3(code);
    case Format::kInt8:
    case Format::kInt8Act8:
    case Format::kInt8Groups:
    case Format::kInt8GroupsAct8:
      return static_cast<int8_t>(code);
    case Format::kFp4:
    case Format::kFp4Act8:
      return small_float(code, 2, 1, 1);
    default:
      return static_cast<int>(code) - 8;
  }
}
inline int code_bits(Format format) { return 32 / unit_weights(format); }

// The code of the weight at `k` of a row-major row.
inline uint32_t get_code(Format format, const void* row, int64_t k) {
  switch (code_bits(format)) {
    case 16:
      return element<uint16_t>(row, k);
    case 8:
      return element<uint8_t>(row, k);
    default:
      return element<uint8_t>(row, k / 2) >> (k % 2 * 4) & 15;
  }
}
inline void set_code(Format format, void* row, int64_t k, uint32_t code) {
  auto* bytes = static_cast<char*>(row);
  switch (code_bits(format)) {
    case 16:
      std::memcpy(bytes + 2 * k, &code, 2);
      return;
    case 8:
      std::memcpy(bytes + k, &code, 1);
      return;
    default: {
      const int shift = k % 2 * 4;
      bytes[k / 2] = static_cast<char>((bytes[k / 2] & ~(15 << shift)) | code << shift);
    }
  }
}
// Number i of entry `index` of a table whose entries have so many.
inline int in_entry(const uint32_t* table, int index, int numbers, int i) {
  return static_cast<int>(table[index * numbers / 4 + i / 4] >> i % 4 * 8 & 255);
}
// Sign i of eight that are in seven bits: the number of ones is even.
inline int sign_of_seven(uint32_t bits, int i) {
  int ones = 0;
  for (int bit = 0; bit < 7; ++bit) ones += bits >> bit & 1;
  return (i < 7 ? bits >> i & 1 : ones % 2) ? -1 : 1;
}

// The value of the weight at `k` of a row of blocks, written down from the structures of ggml.
inline double block_value(Format format, const void* row, int64_t k) {
  const BlockLayout& layout = *block_layout(format);
  const auto* block = static_cast<const uint8_t*>(row) + k / layout.weights * layout.block_bytes;
  const auto w = static_cast<int>(k % layout.weights);
  const auto half = [&](int at) { return double{fp16_to_float(element<uint16_t>(block + at, 0))}; };
  // Q4_K and Q5_K.
  const auto six_bits = [&](int code) {
    const uint8_t* q = block + 4;
    const int j = w / 32;
    const int scale = j < 4 ? q[j] & 63 : (q[j + 4] & 15) | (q[j - 4] >> 6) << 4;
    const int least = j < 4 ? q[j + 4] & 63 : q[j + 4] >> 4 | (q[j] >> 6) << 4;
    return half(0) * scale * code - half(2) * least;
  };
  const int nibble_at = w / 64 * 32 + w % 32, nibble_shift = w / 32 % 2 * 4;
  // The codes of 32 weights from byte `at` on, and their fifth bits.
  const auto nibble = [&](int at) { return block[at + w % 16] >> w % 32 / 16 * 4 & 15; };
  const auto fifth = [&](int at) { return (block[at + w % 32 / 8] >> w % 8 & 1) << 4; };
  // For IQ1, IQ2 and IQ3.
  const auto one_of_iq1 = [&](int index) {
    return (in_entry(codebooks::kIq1Times8Plus16, index, 8, w % 8) - 16) / 8;
  };
  const auto scale_nibble = [&](int at, int group) {
    return block[at + w / group / 2] >> w / group % 2 * 4 & 15;
  };
  const auto sign = [&](int at) { return block[at + w / 8] >> w % 8 & 1 ? -1 : 1; };
  const int pair = w / 128 * 32 + w % 32, pair_shift = w / 32 % 4 * 2;
  switch (format) {
    case Format::kQ2K:
    case Format::kQ2KAct8: {
      const int code = block[16 + pair] >> pair_shift & 3;
      return half(80) * (block[w / 16] & 15) * code - half(82) * (block[w / 16] >> 4);
    }
    case Format::kQ3K:
    case Format::kQ3KAct8: {
      const int code = (block[32 + pair] >> pair_shift & 3) | (block[w % 32] >> w / 32 & 1) << 2;
      const uint8_t* q = block + 96;
      const int j = w / 16;
      const int scale = (j < 8 ? q[j] & 15 : q[j - 8] >> 4) | (q[8 + j % 4] >> j / 4 * 2 & 3) << 4;
      return half(108) * (scale - 32) * (code - 4);
    }
    case Format::kQ4K:
    case Format::kQ4KAct8:
      return six_bits(block[16 + nibble_at] >> nibble_shift & 15);
    case Format::kQ5K:
    case Format::kQ5KAct8:
      return six_bits((block[48 + nibble_at] >> nibble_shift & 15) |
                      (block[16 + w % 32] >> w / 32 & 1) << 4);
    case Format::kQ41:
    case Format::kQ41Act8:
      return half(0) * nibble(4) + half(2);
    case Format::kQ50:
    case Format::kQ50Act8:
      return half(0) * ((nibble(6) | fifth(2)) - 16);
    case Format::kQ51:
    case Format::kQ51Act8:
      return half(0) * (nibble(8) | fifth(4)) + half(2);
    case Format::kIq4Nl:
    case Format::kIq4NlAct8:
      return half(0) * (codebooks::kIq4NlPlus128[nibble(2)] - 128);
    case Format::kIq4Xs:
    case Format::kIq4XsAct8: {
      const int j = w / 32;
      const int high = element<uint16_t>(block, 1) >> 2 * j & 3;
      const int scale = (block[4 + j / 2] >> j % 2 * 4 & 15) | high << 4;
      return half(0) * (scale - 32) * (codebooks::kIq4NlPlus128[nibble(8 + 16 * j)] - 128);
    }
    case Format::kIq1S:
    case Format::kIq1SAct8: {
      const int high = element<uint16_t>(block + 34, w / 32);
      const int index = block[2 + w / 8] | (high >> w / 8 % 4 * 3 & 7) << 8;
      const double moved = one_of_iq1(index) + (high >> 15 ? -0.125 : 0.125);
      return half(0) * (2 * (high >> 12 & 7) + 1) * moved;
    }
    case Format::kIq1M:
    case Format::kIq1MAct8: {
      const int high = block[32 + w / 16] >> w / 8 % 2 * 4 & 15;
      const double moved =
          one_of_iq1(block[w / 8] | (high & 7) << 8) + (high >> 3 ? -0.125 : 0.125);
      int d = 0;
      for (int i = 0; i < 4; ++i) d |= (element<uint16_t>(block + 48, i) >> 12) << 4 * i;
      const int scale = element<uint16_t>(block + 48, w / 64) >> w / 16 % 4 * 3 & 7;
      return double{fp16_to_float(static_cast<uint16_t>(d))} * (2 * scale + 1) * moved;
    }
    case Format::kIq2Xxs:
    case Format::kIq2XxsAct8: {
      const auto signs = element<uint32_t>(block + 2, w / 32 * 2 + 1);
      const int index = block[2 + w / 32 * 8 + w / 8 % 4];
      return half(0) / 8 * (2 * (signs >> 28) + 1) * sign_of_seven(signs >> w / 8 % 4 * 7, w % 8) *
             in_entry(codebooks::kIq2Xxs, index, 8, w % 8);
    }
    case Format::kIq2Xs:
    case Format::kIq2XsAct8: {
      const auto code = element<uint16_t>(block + 2, w / 8);
      return half(0) / 8 * (2 * scale_nibble(66, 16) + 1) * sign_of_seven(code >> 9, w % 8) *
             in_entry(codebooks::kIq2Xs, code & 511, 8, w % 8);
    }
    case Format::kIq2S:
    case Format::kIq2SAct8: {
      const int index = block[2 + w / 8] | (block[66 + w / 32] >> w / 8 % 4 * 2 & 3) << 8;
      return half(0) / 8 * (2 * scale_nibble(74, 16) + 1) * sign(34) *
             in_entry(codebooks::kIq2S, index, 8, w % 8);
    }
    case Format::kIq3Xxs:
    case Format::kIq3XxsAct8: {
      const auto signs = element<uint32_t>(block + 66, w / 32);
      return half(0) / 4 * (2 * (signs >> 28) + 1) * sign_of_seven(signs >> w / 8 % 4 * 7, w % 8) *
             in_entry(codebooks::kIq3Xxs, block[2 + w / 4], 4, w % 4);
    }
    case Format::kIq3S:
    case Format::kIq3SAct8: {
      const int index = block[2 + w / 4] | (block[66 + w / 32] >> w / 4 % 8 & 1) << 8;
      return half(0) * (2 * scale_nibble(106, 32) + 1) * sign(74) *
             in_entry(codebooks::kIq3S, index, 4, w % 4);
    }
    default: {  // Q6_K
      const int low = block[w / 128 * 64 + w % 64] >> w / 64 % 2 * 4 & 15;
      const int high = block[128 + pair] >> pair_shift & 3;
      return half(208) * static_cast<int8_t>(block[192 + w / 16]) * ((low | high << 4) - 32);
    }
  }
}
inline double scale_value(ScaleType type, const void* scales, int64_t index) {
  switch (type) {
    case ScaleType::kNone:
      return 1;
    case ScaleType::kBf16:
      return bf16_to_float(element<uint16_t>(scales, index));
    case ScaleType::kFp16:
      return fp16_to_float(element<uint16_t>(scales, index));
    case ScaleType::kE8m0:
      return e8m0(element<uint8_t>(scales, index));
    case ScaleType::kE4m3:
      return e4m3(element<uint8_t>(scales, index));
    default:
      return element<float>(scales, index);
  }
}

using Random = std::mt19937;

inline float random_normal(Random& random) { return std::normal_distribution<float>()(random); }
inline uint32_t random_below(Random& random, uint32_t end) {
  return std::uniform_int_distribution<uint32_t>(0, end - 1)(random);
}

// Where a block has factors in fp16. That of IQ1_M is in four parts, which random_blocks knows.
inline std::vector<int64_t> factors_of(Format format) {
  const BlockLayout& layout = *block_layout(format);
  switch (format) {
    case Format::kQ2K:
    case Format::kQ2KAct8:
      return {80, 82};
    case Format::kQ4K:
    case Format::kQ4KAct8:
    case Format::kQ5K:
    case Format::kQ5KAct8:
    case Format::kQ41:
    case Format::kQ41Act8:
    case Format::kQ51:
    case Format::kQ51Act8:
      return {0, 2};
    case Format::kIq1M:
    case Format::kIq1MAct8:
      return {};
    case Format::kQ3K:
    case Format::kQ3KAct8:
    case Format::kQ6K:
    case Format::kQ6KAct8:
      return {layout.block_bytes - 2};
    default:
      return {0};
  }
}
// Blocks of random bits, with finite factors.
inline std::vector<char> random_blocks(Format format, int64_t rows, int64_t k, Random& random) {
  const BlockLayout& layout = *block_layout(format);
  std::vector<char> blocks(rows * row_bytes(format, k));
  for (char& byte : blocks) byte = static_cast<char>(random_below(random, 256));
  for (size_t block = 0; block < blocks.size(); block += layout.block_bytes) {
    const auto factor = [&] {
      const float of = std::uniform_real_distribution<float>(0.01f, 0.04f)(random);
      return float_to_fp16(random_below(random, 2) ? of : -of);
    };
    char* const begin = blocks.data() + block;
    for (int64_t at : factors_of(format)) {
      const uint16_t code = factor();
      std::memcpy(begin + at, &code, 2);
    }
    for (int i = 0, code = factor(); &layout == block_layout(Format::kIq1M) && i < 4; ++i) {
      char& high = begin[48 + 2 * i + 1];
      high = static_cast<char>((high & 15) | (code >> 4 * i & 15) << 4);
    }
  }
  return blocks;
}

// Random finite weights: normally distributed in the 16-bit formats, any code in the others.
inline std::vector<char> random_weights(Format format, int64_t rows, int64_t k, Random& random) {
  if (block_layout(format) != nullptr) return random_blocks(format, rows, k, random);
  const int64_t bytes = row_bytes(format, k);
  std::vector<char> weights(rows * bytes);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < k; ++i) {
      uint32_t code = random_below(random, 1u << std::min(code_bits(format), 8));
      if (format == Format::kBf16) code = float_to_bf16(random_normal(random));
      if (format == Format::kFp16) code = float_to_fp16(random_normal(random));
      if (format == Format::kFp8 && (code & 127) == 127) code = 0;
      set_code(format, weights.data() + row * bytes, i, code);
    }
  }
  return weights;
}
inline std::vector<char> random_scales(ScaleType type, int64_t count, Random& random) {
  const int64_t bytes = bytes_of(type);
  std::vector<char> scales(count * bytes);
  for (int64_t i = 0; i < count && bytes != 0; ++i) {
    const float value = std::uniform_real_distribution<float>(0.5f, 2.0f)(random);
    uint32_t code = bits_of(value);
    if (type == ScaleType::kBf16) code = float_to_bf16(value);
    if (type == ScaleType::kFp16) code = float_to_fp16(value);
    if (type == ScaleType::kE8m0) code = 124 + random_below(random, 7);
    if (type == ScaleType::kE4m3) code = 0x20 + random_below(random, 0x40);
    std::memcpy(scales.data() + i * bytes, &code, bytes);
  }
  return scales;
}
inline std::vector<float> random_floats(int64_t count, Random& random) {
  std::vector<float> values(count);
  for (float& value : values) value = random_normal(random);
  return values;
}

// The activation of a gate and an up value.
inline double activated(const ActivationSpec& spec, double gate, double up) {
  switch (spec.kind) {
    case Activation::kSilu:
      return gate / (1 + std::exp(-gate)) * up;
    case Activation::kGelu:
      return 0.5 * gate * std::erfc(-gate / M_SQRT2) * up;
    case Activation::kGeluTanh:
      return gate /
             (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (gate + 0.044715 * std::pow(gate, 3)))) * up;
    case Activation::kSwigluOai: {
      const double limit = spec.limit;
      gate = std::min(gate, limit);
      up = std::clamp(up, -limit, limit);
      return (up + spec.beta) * gate / (1 + std::exp(-double{spec.alpha} * gate));
    }
    case Activation::kSwigluStep: {
      const double limit = spec.limit;
      return std::min(gate / (1 + std::exp(-gate)), limit) * std::clamp(up, -limit, limit);
    }
    case Activation::kRelu2:
      return up > 0 ? up * up : 0;
  }
  return NAN;
}

}  // namespace lk::test_values

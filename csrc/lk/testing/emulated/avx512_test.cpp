// Compares the emulated instructions with their definitions in Intel's Software Developer's Manual,
// volume 2, lane by lane, and with the real ones where the CPU has them.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "lk/testing/emulated/definitions.h"
#include "lk/testing/emulated/operation.h"

namespace lk {
namespace {

using namespace definitions;

using Definition = std::function<void(const Operands&, char*)>;

// A result of `count` lanes of type T, of(operands, lane).
template <class T, class Of>
Definition lanes(int count, Of of) {
  return [=](const Operands& o, char* out) {
    for (int i = 0; i < count; ++i) {
      const auto value = static_cast<T>(of(o, i));
      std::memcpy(out + i * sizeof(T), &value, sizeof(T));
    }
  };
}

// The manual's convert_fp32_to_bfloat16.
uint16_t narrowed(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const auto high = static_cast<uint16_t>(bits >> 16);
  if (std::isnan(value)) return high | 0x40;
  if (std::isinf(value)) return high;
  if (flushed(value) == 0) return high & 0x8000;
  return static_cast<uint16_t>((bits + 0x7fff + (high & 1)) >> 16);
}

float half_to_float(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const int fraction = half & 1023;
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  if (exponent == 31) {
    const uint32_t quiet_bit = fraction != 0 ? 0x00400000u : 0u;
    return std::bit_cast<float>(sign | 0x7f800000u | quiet_bit | uint32_t(fraction) << 13);
  }
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024, exponent - 25);
  return std::copysign(static_cast<float>(magnitude), std::bit_cast<float>(sign | 0x3f800000u));
}

uint32_t logic(const Operands& o, int i, int function) {
  uint32_t result = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const auto of = [&](const char* p) { return lane<uint32_t>(p, i) >> bit & 1; };
    const uint32_t place = of(o.a) << 2 | of(o.b) << 1 | of(o.c);
    result |= (function >> place & 1u) << bit;
  }
  return result;
}

// Lane i of a vector whose 16-byte parts interleave the lower or the upper lanes of those of a and
// b.
template <class T>
T interleaved(const Operands& o, int i, bool upper) {
  constexpr int kLanes = 16 / sizeof(T);
  const int from = i / kLanes * kLanes + i % kLanes / 2 + (upper ? kLanes / 2 : 0);
  return lane<T>(i % 2 ? o.b : o.a, from);
}

int32_t byte_products(const Operands& o, int i) {
  int64_t sum = lane<int32_t>(o.a, i);
  for (int n = 4 * i; n < 4 * i + 4; ++n) sum += lane<uint8_t>(o.b, n) * lane<int8_t>(o.c, n);
  return static_cast<int32_t>(sum);
}

const std::map<std::string, Definition> kDefinitions = {
    {"set1_ps", lanes<float>(16, [](auto& o, int) { return lane<float>(o.a, 0); })},
    {"set1_epi8", lanes<char>(64, [](auto& o, int) { return o.a[0]; })},
    {"set1_epi16", lanes<int16_t>(32, [](auto& o, int) { return o.mask; })},
    {"set1_epi32", lanes<int32_t>(16, [](auto& o, int) { return o.mask; })},
    {"maskz_set1_epi8",
     lanes<char>(64, [](auto& o, int i) { return o.mask >> i & 1 ? o.a[0] : 0; })},
    {"setr_epi32", lanes<int32_t>(16, [](auto&, int i) { return i % 2 ? -i : i; })},
    {"broadcast_i32x4", lanes<char>(64, [](auto& o, int i) { return o.a[i % 16]; })},
    {"broadcast_i64x4", lanes<char>(64, [](auto& o, int i) { return o.a[i % 32]; })},
    {"maskz_loadu_epi8",
     lanes<char>(64, [](auto& o, int i) { return o.mask >> i & 1 ? o.a[i] : 0; })},
    {"maskz_loadu_epi32",
     lanes<uint32_t>(16,
                     [](auto& o, int i) { return o.mask >> i & 1 ? lane<uint32_t>(o.a, i) : 0; })},
    {"storeu_si512", lanes<char>(64, [](auto& o, int i) { return o.a[i]; })},
    {"stream_ps", lanes<char>(64, [](auto& o, int i) { return o.a[i]; })},
    {"mul_ps",
     lanes<float>(16, [](auto& o, int i) { return lane<float>(o.a, i) * lane<float>(o.b, i); })},
    {"fmadd_ps", lanes<float>(16,
                              [](auto& o, int i) {
                                return fused(lane<float>(o.a, i), lane<float>(o.b, i),
                                             lane<float>(o.c, i));
                              })},
    {"cvtph_ps",
     lanes<float>(16, [](auto& o, int i) { return half_to_float(lane<uint16_t>(o.a, i)); })},
    {"cvtps_epi32", lanes<int32_t>(16,
                                   [](auto& o, int i) {
                                     const float value = lane<float>(o.a, i);
                                     return value >= -0x1p31f && value < 0x1p31f
                                                ? static_cast<int32_t>(std::nearbyint(value))
                                                : std::numeric_limits<int32_t>::min();
                                   })},
    {"reduce_add_ps", lanes<float>(1,
                                   [](auto& o, int) {
                                     float sums[16];
                                     std::memcpy(sums, o.a, sizeof(sums));
                                     for (int n = 8; n != 0; n /= 2) {
                                       for (int i = 0; i < n; ++i) sums[i] = sums[i + n] + sums[i];
                                     }
                                     return sums[0];
                                   })},
    {"add_epi8", lanes<char>(64, [](auto& o, int i) { return o.a[i] + o.b[i]; })},
    {"add_epi16",
     lanes<uint16_t>(
         32, [](auto& o, int i) { return lane<uint16_t>(o.a, i) + lane<uint16_t>(o.b, i); })},
    {"madd_epi16", lanes<int32_t>(16,
                                  [](auto& o, int i) {
                                    int64_t sum = 0;
                                    for (int n = 2 * i; n < 2 * i + 2; ++n) {
                                      sum += lane<int16_t>(o.a, n) * lane<int16_t>(o.b, n);
                                    }
                                    return sum;
                                  })},
    {"maddubs_epi16", lanes<int16_t>(32,
                                     [](auto& o, int i) {
                                       int sum = 0;
                                       for (int n = 2 * i; n < 2 * i + 2; ++n) {
                                         sum += lane<uint8_t>(o.a, n) * lane<int8_t>(o.b, n);
                                       }
                                       return std::clamp(sum, -32768, 32767);
                                     })},
    {"or_si512", lanes<char>(64, [](auto& o, int i) { return o.a[i] | o.b[i]; })},
    {"ternarylogic_epi32 0xec",
     lanes<uint32_t>(16, [](auto& o, int i) { return logic(o, i, 0xec); })},
    {"ternarylogic_epi32 0xf4",
     lanes<uint32_t>(16, [](auto& o, int i) { return logic(o, i, 0xf4); })},
    {"ternarylogic_epi32 0xf8",
     lanes<uint32_t>(16, [](auto& o, int i) { return logic(o, i, 0xf8); })},
    {"slli_epi16 7",
     lanes<uint16_t>(32, [](auto& o, int i) { return lane<uint16_t>(o.a, i) << 7; })},
    {"srli_epi16 4",
     lanes<uint16_t>(32, [](auto& o, int i) { return lane<uint16_t>(o.a, i) >> 4; })},
    {"srli_epi16 16", lanes<uint16_t>(32, [](auto&, int) { return 0; })},
    {"srli_epi32 16",
     lanes<uint32_t>(16, [](auto& o, int i) { return lane<uint32_t>(o.a, i) >> 16; })},
    {"cmple_epu8_mask", lanes<uint64_t>(1,
                                        [](auto& o, int) {
                                          uint64_t mask = 0;
                                          for (int i = 0; i < 64; ++i) {
                                            const bool le =
                                                lane<uint8_t>(o.a, i) <= lane<uint8_t>(o.b, i);
                                            mask |= uint64_t{le} << i;
                                          }
                                          return mask;
                                        })},
    {"cvtepi32_epi16",
     lanes<uint16_t>(16, [](auto& o, int i) { return lane<uint32_t>(o.a, i) & 0xffff; })},
    {"cvtsepi32_epi16",
     lanes<int16_t>(
         16, [](auto& o, int i) { return std::clamp(lane<int32_t>(o.a, i), -32768, 32767); })},
    {"i32gather_epi32",  // of the low four bits of 64
     lanes<uint32_t>(16,
                     [](auto& o, int i) {
                       return lane<uint32_t>(o.b, i % 2 ? 0 : lane<uint32_t>(o.a, i) & 15);
                     })},
    {"shuffle_epi8",
     lanes<char>(64,
                 [](auto& o, int i) { return o.b[i] < 0 ? 0 : o.a[i / 16 * 16 + (o.b[i] & 15)]; })},
    {"shuffle_ps 0x88", lanes<uint32_t>(16,
                                        [](auto& o, int i) {
                                          return lane<uint32_t>(i % 4 < 2 ? o.a : o.b,
                                                                i / 4 * 4 + i % 2 * 2);
                                        })},
    {"shuffle_ps 0xdd", lanes<uint32_t>(16,
                                        [](auto& o, int i) {
                                          return lane<uint32_t>(i % 4 < 2 ? o.a : o.b,
                                                                i / 4 * 4 + i % 2 * 2 + 1);
                                        })},
    {"inserti64x4 1",
     lanes<char>(64, [](auto& o, int i) { return i < 32 ? o.a[i] : o.b[i - 32]; })},
    {"unpacklo_epi8",
     lanes<uint8_t>(64, [](auto& o, int i) { return interleaved<uint8_t>(o, i, false); })},
    {"unpackhi_epi8",
     lanes<uint8_t>(64, [](auto& o, int i) { return interleaved<uint8_t>(o, i, true); })},
    {"unpacklo_epi16",
     lanes<uint16_t>(32, [](auto& o, int i) { return interleaved<uint16_t>(o, i, false); })},
    {"unpackhi_epi16",
     lanes<uint16_t>(32, [](auto& o, int i) { return interleaved<uint16_t>(o, i, true); })},
    {"permutexvar_epi16",
     lanes<uint16_t>(
         32, [](auto& o, int i) { return lane<uint16_t>(o.b, lane<uint16_t>(o.a, i) & 31); })},
    {"permutex2var_epi16", lanes<uint16_t>(32,
                                           [](auto& o, int i) {
                                             const int from = lane<uint16_t>(o.b, i);
                                             return lane<uint16_t>(from & 32 ? o.c : o.a,
                                                                   from & 31);
                                           })},
    {"permutexvar_epi32",
     lanes<uint32_t>(
         16, [](auto& o, int i) { return lane<uint32_t>(o.b, lane<uint32_t>(o.a, i) & 15); })},
    {"permutex2var_epi8",
     lanes<char>(64, [](auto& o, int i) { return (o.b[i] & 64 ? o.c : o.a)[o.b[i] & 63]; })},
    {"multishift_epi64_epi8", lanes<uint8_t>(64,
                                             [](auto& o, int i) {
                                               int byte = 0;
                                               for (int bit = 0; bit < 8; ++bit) {
                                                 const int from = (o.a[i] + bit) & 63;
                                                 const int in = i / 8 * 8 + from / 8;
                                                 byte |= (o.b[in] >> from % 8 & 1) << bit;
                                               }
                                               return static_cast<uint8_t>(byte);
                                             })},
    {"dpbusd_epi32", lanes<int32_t>(16, byte_products)},
    {"dpbusd_epi32 of 128 bits", lanes<int32_t>(4, byte_products)},
    {"dpwssd_epi32", lanes<int32_t>(16,
                                    [](auto& o, int i) {
                                      int64_t sum = lane<int32_t>(o.a, i);
                                      for (int n = 2 * i; n < 2 * i + 2; ++n) {
                                        sum += lane<int16_t>(o.b, n) * lane<int16_t>(o.c, n);
                                      }
                                      return sum;
                                    })},
    {"cvtne2ps_pbh",
     lanes<uint16_t>(
         32, [](auto& o, int i) { return narrowed(lane<float>(i < 16 ? o.b : o.a, i % 16)); })},
    {"dpbf16_ps", lanes<float>(16,
                               [](auto& o, int i) {
                                 float sum = lane<float>(o.a, i);
                                 for (int n : {2 * i + 1, 2 * i}) {
                                   sum = flushed_fused(widened(lane<uint16_t>(o.b, n)),
                                                       widened(lane<uint16_t>(o.c, n)), sum);
                                 }
                                 return sum;
                               })},
};

// Runs an operation, which leaves bytes behind its result alone.
std::vector<char> result(const Definition& run, const Operands& operands) {
  alignas(64) char out[64];
  std::memset(out, 0x5a, sizeof(out));
  run(operands, out);
  return {out, out + sizeof(out)};
}

Operands random_operands(Random& random) {
  Operands operands;
  fill(operands.a, 16, random);
  fill(operands.b, 16, random);
  fill(operands.c, 16, random);
  operands.mask = random() % 4 == 0 ? ~uint64_t{0} : random();
  return operands;
}

// Which of two NaNs a sum or a product is, is the compiler's choice: it may swap the operands.
bool same_but_nan(const std::string& name, const std::vector<char>& x, const std::vector<char>& y) {
  if (name != "mul_ps" && name != "reduce_add_ps") return x == y;
  for (int i = 0; i < 16; ++i) {
    const float a = lane<float>(x.data(), i);
    const float b = lane<float>(y.data(), i);
    if (std::memcmp(&a, &b, 4) != 0 && !(std::isnan(a) && std::isnan(b))) return false;
  }
  return true;
}

constexpr int kRounds = 4000;

TEST(EmulatedInstructions, AreAsDefined) {
  for (const Operation& operation : emulated_operations()) {
    const auto definition = kDefinitions.find(operation.name);
    ASSERT_NE(definition, kDefinitions.end()) << operation.name;
    Random random(5);
    for (int round = 0; round < kRounds; ++round) {
      const Operands operands = random_operands(random);
      ASSERT_TRUE(same_but_nan(operation.name, result(operation.run, operands),
                               result(definition->second, operands)))
          << operation.name << " in round " << round;
    }
  }
  EXPECT_EQ(emulated_operations().size(), kDefinitions.size());
}

TEST(EmulatedInstructions, AreAsReal) {
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bf16") ||
      !__builtin_cpu_supports("avx512vbmi")) {
    GTEST_SKIP() << "this CPU lacks AVX-512 with VNNI, BF16 and VBMI";
  }
  for (size_t i = 0; i < emulated_operations().size(); ++i) {
    const Operation& emulated = emulated_operations()[i];
    const Operation& real = real_operations()[i];
    ASSERT_STREQ(emulated.name, real.name);
    Random random(6);
    for (int round = 0; round < kRounds; ++round) {
      const Operands operands = random_operands(random);
      ASSERT_TRUE(
          same_but_nan(emulated.name, result(emulated.run, operands), result(real.run, operands)))
          << emulated.name << " in round " << round;
    }
  }
}

}  // namespace
}  // namespace lk

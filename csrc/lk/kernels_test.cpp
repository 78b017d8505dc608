// Every instruction set's kernels against the same arithmetic in double precision.
#include "lk/kernels.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#define LK_ISA test_reference
#include "lk/simd.h"

namespace lk {
namespace {

using test_reference::bf16_to_float;
using test_reference::float_of;
using test_reference::float_to_bf16;
using test_reference::float_to_fp16;
using test_reference::fp16_to_float;

TEST(Conversions, Bf16RoundsToNearestEven) {
  EXPECT_EQ(float_to_bf16(1.0f), 0x3f80);
  EXPECT_EQ(float_to_bf16(float_of(0x3f808000)), 0x3f80);  // a tie goes to the even neighbour
  EXPECT_EQ(float_to_bf16(float_of(0x3f818000)), 0x3f82);
  EXPECT_EQ(float_to_bf16(float_of(0x3f808001)), 0x3f81);
  EXPECT_EQ(float_to_bf16(INFINITY), 0x7f80);
  EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(float_of(0x7f800001)))));
}

// All halves there are, and the values half-way between neighbours.
TEST(Conversions, Fp16ThereAndBack) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = fp16_to_float(half);
    const int exponent = half >> 10 & 31;
    const int fraction = half & 1023;
    if (exponent == 31) {
      EXPECT_TRUE(fraction ? std::isnan(value) : std::isinf(value));
      EXPECT_EQ(std::isnan(fp16_to_float(float_to_fp16(value))), fraction != 0);
      continue;
    }
    const double want =
        std::ldexp(exponent ? 1024 + fraction : fraction, (exponent ? exponent : 1) - 25);
    EXPECT_EQ(value, static_cast<float>(half & 0x8000 ? -want : want));
    EXPECT_EQ(float_to_fp16(value), half);
    if (half < 0x7bff) {
      const float middle = (value + fp16_to_float(static_cast<uint16_t>(half + 1))) / 2;
      EXPECT_EQ(float_to_fp16(middle), half + (half & 1)) << bits;
    }
  }
  EXPECT_EQ(float_to_fp16(65520.0f), 0x7c00);
  EXPECT_EQ(float_to_fp16(1e30f), 0x7c00);
  EXPECT_EQ(float_to_fp16(-1e-30f), 0x8000);
}

struct KernelCase {
  std::string isa;
  Format format;
};

void PrintTo(const KernelCase& c, std::ostream* out) {
  *out << c.isa << (c.format == Format::kBf16 ? " bf16" : " fp16");
}

class Kernel : public testing::TestWithParam<KernelCase> {
 protected:
  void SetUp() override {
    try {
      kernels_ = &choose_kernels(GetParam().isa);
    } catch (const std::invalid_argument& error) {
      GTEST_SKIP() << error.what();
    }
  }
  const FormatKernels& format() const { return kernels_->of(GetParam().format); }
  bool bf16_acts() const { return format().act_bytes == 2; }
  uint16_t encode(float value) const {
    return GetParam().format == Format::kBf16 ? float_to_bf16(value) : float_to_fp16(value);
  }
  float decode(uint16_t value) const {
    return GetParam().format == Format::kBf16 ? bf16_to_float(value) : fp16_to_float(value);
  }
  float act(const std::vector<char>& row, int64_t i) const {
    return bf16_acts() ? bf16_to_float(reinterpret_cast<const uint16_t*>(row.data())[i])
                       : reinterpret_cast<const float*>(row.data())[i];
  }
  std::vector<char> act_row(int64_t k) const {
    return std::vector<char>(padded(k) * format().act_bytes, 0x7f);
  }

  const Kernels* kernels_ = nullptr;
  std::mt19937 random_{1};
  std::normal_distribution<float> normal_;
};

// All sizes of tiles and tails, each with weights that end where their memory does, and the same
// bits for a token alone and among others, for a row alone and among others.
TEST_P(Kernel, Matmul) {
  for (int64_t k : {1, 15, 16, 17, 31, 32, 33, 64, 95, 100, 768, 2047}) {
    for (int64_t rows : {1, 3, 4, 9}) {
      for (int64_t tokens : {1, 2, 3, 5, 6, 7, 13, 48}) {
        std::vector<uint16_t> weights(rows * k);
        for (auto& w : weights) w = encode(normal_(random_));
        std::vector<std::vector<char>> acts;
        std::vector<const void*> act_rows;
        std::vector<std::vector<float>> out(tokens, std::vector<float>(rows, NAN));
        std::vector<float*> out_rows;
        for (int64_t t = 0; t < tokens; ++t) {
          std::vector<uint16_t> x(k);
          for (auto& value : x) value = float_to_bf16(normal_(random_));
          acts.push_back(act_row(k));
          format().pack(x.data(), Scalar::kBf16, k, 1.0f, acts.back().data());
        }
        for (int64_t t = 0; t < tokens; ++t) {
          act_rows.push_back(acts[t].data());
          out_rows.push_back(out[t].data());
        }
        format().matmul({weights.data(), weights.data(), 2 * k, rows, k, act_rows.data(),
                         out_rows.data(), tokens});
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t r = 0; r < rows; ++r) {
            double want = 0;
            double size = 0;
            for (int64_t i = 0; i < k; ++i) {
              const double term = double{decode(weights[r * k + i])} * act(acts[t], i);
              want += term;
              size += std::abs(term);
            }
            EXPECT_NEAR(out[t][r], want, 1e-6 * size + 1e-30) << k << " " << rows << " " << tokens;
          }
        }
        float alone = NAN;
        float* alone_out = &alone;
        format().matmul({weights.data() + (rows - 1) * k, nullptr, 2 * k, 1, k,
                         &act_rows[tokens - 1], &alone_out, 1});
        EXPECT_EQ(alone, out[tokens - 1][rows - 1]) << k << " " << rows << " " << tokens;
      }
    }
  }
}

TEST_P(Kernel, PackScalesAndPadsWithZeros) {
  for (Scalar type : {Scalar::kBf16, Scalar::kFp16}) {
    for (int64_t n : {1, 31, 32, 100}) {
      std::vector<uint16_t> x(n);
      for (int64_t i = 0; i < n; ++i) {
        const float value = normal_(random_);
        x[i] = type == Scalar::kBf16 ? float_to_bf16(value) : float_to_fp16(value);
      }
      std::vector<char> row = act_row(n);
      format().pack(x.data(), type, n, 0.75f, row.data());
      for (int64_t i = 0; i < padded(n); ++i) {
        const float from = i >= n                  ? 0
                           : type == Scalar::kBf16 ? bf16_to_float(x[i])
                                                   : fp16_to_float(x[i]);
        const float want = 0.75f * from;
        EXPECT_EQ(act(row, i), bf16_acts() ? bf16_to_float(float_to_bf16(want)) : want);
      }
    }
  }
}

TEST_P(Kernel, Activations) {
  std::vector<float> gate;
  for (float x = -100; x < 100; x += 0.0137f) gate.push_back(x);
  for (float x : {-1e30f, -0.0f, 0.0f, 1e-30f, 1e30f}) gate.push_back(x);
  const auto n = static_cast<int64_t>(gate.size());
  const std::vector<float> up(n, 1.0f);
  for (Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh}) {
    std::vector<char> row = act_row(n);
    format().activate(activation, gate.data(), up.data(), n, row.data());
    for (int64_t i = 0; i < n; ++i) {
      const double x = gate[i];
      const double want =
          activation == Activation::kSilu ? x / (1 + std::exp(-x))
          : activation == Activation::kGelu
              ? 0.5 * x * (1 + std::erf(x / M_SQRT2))
              : 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
      const double bound = bf16_acts() ? std::abs(want) / 256 : std::abs(want) * 2e-6;
      // Absolute part: the tail of erf, and e^-87 where exp is cut off.
      EXPECT_NEAR(act(row, i), want, bound + 1e-6 * std::min(1.0, std::abs(x))) << x;
    }
  }
}

TEST_P(Kernel, Combine) {
  const int64_t n = 600;
  std::vector<float> rows(3 * 700);
  for (float& value : rows) value = normal_(random_);
  const float weights[3] = {0.5f, 2.0f, -1.0f};
  const int32_t ids[3] = {4, -1, 0};
  std::vector<uint16_t> out(n);
  kernels_->combine(rows.data(), 700, weights, ids, 3, n, Scalar::kFp16, out.data());
  for (int64_t i = 0; i < n; ++i) {
    const float want = 0.5f * rows[i] - rows[1400 + i];
    EXPECT_NEAR(fp16_to_float(out[i]), want, std::abs(want) / 2048 + 1e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Kernel,
                         testing::Values(KernelCase{"portable", Format::kBf16},
                                         KernelCase{"portable", Format::kFp16},
                                         KernelCase{"avx2", Format::kBf16},
                                         KernelCase{"avx2", Format::kFp16},
                                         KernelCase{"avx512_bf16", Format::kBf16},
                                         KernelCase{"avx512_bf16", Format::kFp16}));

TEST(ChooseKernels, NamesWhatThisCpuRuns) {
  EXPECT_STREQ(choose_kernels("portable").isa, "portable");
  try {
    choose_kernels("sse9");
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("\"sse9\", must be one of"), std::string::npos);
  }
}

}  // namespace
}  // namespace lk

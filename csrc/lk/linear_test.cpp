#include "lk/linear.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "lk/testing/random_layers.h"

namespace lk {
namespace {

using namespace test_values;

constexpr const char* kPool = "2 nodes x 2,1 cores x 1 threads";

struct LinearKind {
  std::string name;
  Format format;
  Extras extras;
};
void PrintTo(const LinearKind& kind, std::ostream* out) { *out << kind.name; }

const LinearKind kLinearKinds[] = {
    {"bf16", Format::kBf16, {}},
    {"bf16_bias", Format::kBf16, {.bias = true}},
    {"fp16_bias", Format::kFp16, {.bias = true}},
    {"fp8_blocks", Format::kFp8, {.scale_type = ScaleType::kFloatBlocks, .group = 128}},
    {"int8_bias", Format::kInt8, {.row_scale = true, .bias = true}},
    {"int8_act8", Format::kInt8Act8, {.row_scale = true}},
    {"int4", Format::kInt4, {.scale_type = ScaleType::kBf16, .group = 32}},
    {"nvfp4_act8",
     Format::kFp4Act8,
     {.scale_type = ScaleType::kE4m3, .group = 16, .part_scale = true}},
};

using LinearCase = std::tuple<std::string, LinearKind>;
class LinearOf : public testing::TestWithParam<LinearCase> {};

TEST_P(LinearOf, MatchesTheReference) {
  const auto& [isa, kind] = GetParam();
  constexpr int64_t kRows = 330;
  constexpr int64_t kK = 264;
  constexpr int64_t kStride = kK + 7;  // rows of x need not follow each other
  Random random(11);
  ThreadPool pool(parse_topology(kPool), {});
  Workspace workspace;
  TestMatrix matrix(kind.format, 1, 1, kRows, kK, false, kind.extras, random);
  const LinearSpec spec{matrix.spec()};
  const std::vector<float> bias = matrix.data.bias;
  order_linear(spec, pool);
  for (const int64_t tokens : {1, 4, 37, 230}) {
    std::vector<uint16_t> x(tokens * kStride);
    for (uint16_t& value : x) value = float_to_bf16(random_normal(random));
    std::vector<uint16_t> y(tokens * kRows, 0xffff);
    LinearBatch batch{Scalar::kBf16, tokens, x.data(), kStride, y.data()};
    linear(spec, batch, kernels_named(isa), pool, workspace);
    const double bound = is_act8(kind.format) ? 2e-2 : 4e-3;  // as in moe_test.cpp
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t row = 0; row < kRows; ++row) {
        double want = bias.empty() ? 0 : bias[row];
        for (int64_t i = 0; i < kK; ++i) {
          want += matrix.values[row * kK + i] * bf16_to_float(x[t * kStride + i]);
        }
        ASSERT_NEAR(bf16_to_float(y[t * kRows + row]), want,
                    bound * (6 * matrix.size + std::abs(want)))
            << "token " << t << " of " << tokens << ", row " << row;
      }
    }
    // A token's result does not depend on its neighbours or the threads, not even in the last bit.
    ThreadPool alone(parse_topology("1 nodes x 1 cores x 1 threads"), {});
    const int64_t last = tokens - 1;
    std::vector<uint16_t> one(kRows);
    batch = {Scalar::kBf16, 1, x.data() + last * kStride, kStride, one.data()};
    linear(spec, batch, kernels_named(isa), alone, workspace);
    EXPECT_TRUE(std::equal(one.begin(), one.end(), y.begin() + last * kRows)) << tokens;
  }
}

INSTANTIATE_TEST_SUITE_P(All, LinearOf,
                         testing::Combine(testing::ValuesIn(available_kernels()),
                                          testing::ValuesIn(kLinearKinds)),
                         [](const auto& info) {
                           return std::get<0>(info.param) + "_" + std::get<1>(info.param).name;
                         });

}  // namespace
}  // namespace lk

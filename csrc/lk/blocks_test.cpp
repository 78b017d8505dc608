#include "lk/blocks.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "lk/moe.h"
#include "lk/testing/random_layers.h"
#include "lk/testing/reference_block.h"

namespace lk {
namespace {

using namespace test_values;

Matrix matrix_of(Format format, int64_t rows, int64_t k, char* weights) {
  Matrix m;
  m.format = format;
  m.weights = weights;
  m.rows = rows;
  m.k = k;
  m.row_bytes = row_bytes(format, k);
  m.scale_type = ScaleType::kInBlocks;
  m.group = block_layout(format)->group;
  return m;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

using Case = std::tuple<std::string, Format>;

class Blocks : public testing::TestWithParam<Case> {
 protected:
  Format format() const { return std::get<1>(GetParam()); }
  const FormatKernels& kernels() const {
    return kernels_named(std::get<0>(GetParam())).of(format());
  }

  // Compares a tile times tokens with the sums in double precision, and each token with itself
  // alone. Activations are small integers, which all arithmetics but bytes and 16-bit integers
  // keep; those have a largest activation that makes their scale a power of two.
  void check(int64_t rows, int64_t k, int64_t tokens) {
    SCOPED_TRACE(testing::Message() << rows << " rows, k " << k << ", " << tokens << " tokens");
    std::vector<char> weights = random_weights(format(), rows, k, random_);
    std::vector<double> values;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < k; ++i) {
        values.push_back(block_value(format(), weights.data() + r * row_bytes(format(), k), i));
      }
    }
    Matrix m = matrix_of(format(), rows, k, weights.data());
    ThreadPool pool(parse_topology("1 node x 1 cores x 1 threads"), {});
    order_matrix(m, 1, pool);
    const float most = std::string(kernels().arithmetic) == "int16" ? 32767 : 127;
    const BlockLayout& layout = *block_layout(format());
    const bool may_be_least = layout.weights / layout.units == 16 && random_below(random_, 2);
    const int log2 = may_be_least || m.group == 16 ? kLeastActBlockLog2 : kActBlockLog2;
    std::vector<std::vector<float>> x(tokens);
    std::vector<std::vector<char>> acts(tokens);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < k; ++i) {
        x[t].push_back(static_cast<float>(static_cast<int>(random_below(random_, 255)) - 127));
        if (i % 16 == 0) x[t].back() = most;
      }
      acts[t].assign(kernels().act_row_bytes(k), -1);
      kernels().pack(x[t].data(), k, 0, k, log2, acts[t].data());
    }
    const std::vector<float> out = run(m, acts, 0, tokens, log2);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t r = 0; r < rows; ++r) {
        double sum = 0, size = 0;
        for (int64_t i = 0; i < k; ++i) {
          const double term = values[r * k + i] * x[t][i];
          sum += term;
          size += std::abs(term);
        }
        // The codes are lowered by half of their range and the minimums raised by as much, which
        // adds to what is rounded.
        ASSERT_NEAR(out[t * kTileRows + r], sum, 4e-6 * size) << "token " << t << ", row " << r;
      }
      const std::vector<float> alone = run(m, acts, t, 1, log2);
      ASSERT_EQ(std::memcmp(out.data() + t * kTileRows, alone.data(), rows * sizeof(float)), 0)
          << "token " << t;
    }
  }

  std::vector<float> run(const Matrix& m, const std::vector<std::vector<char>>& packed,
                         int64_t first, int64_t tokens, int log2) const {
    std::vector<const void*> acts;
    for (int64_t t = 0; t < tokens; ++t) acts.push_back(packed[first + t].data());
    std::vector<char> gathered;
    if (kernels().gathers(tokens)) {
      gathered.resize(kernels().gathered_bytes(m.k, tokens));
      kernels().gather(acts.data(), tokens, m.k, gathered.data());
    }
    std::vector<float> out((tokens + kOutPadding) * kTileRows, NAN);
    const std::unique_ptr<char, Free> scratch(
        static_cast<char*>(std::aligned_alloc(64, kScratchBytes)));
    std::memset(scratch.get(), -1, kScratchBytes);
    MatmulArgs args = m.product(0, 0, 0);
    args.next = tokens % 2 ? m.weights : nullptr;
    args.acts = acts.data();
    args.gathered = gathered.data();
    args.act_block_log2 = log2;
    args.tokens = tokens;
    args.out = out.data();
    args.scratch = scratch.get();
    kernels().matmul(args);
    return out;
  }

  Random random_{3};
};

TEST_P(Blocks, Products) {
  constexpr int64_t kRows[] = {64, 45, 13, 1, 32, 61};
  constexpr int64_t kBlocks[] = {1, 2, 3, 5, 8};
  constexpr int64_t kTokens[] = {1, 2, 3, 4, 5, 6, 7, 11, 16, 17, 40};
  for (int64_t i = 0; i < 33; ++i) {
    // Small blocks need no whole number of 256 weights.
    const int64_t k = block_layout(format())->weights == kBlockWeights
                          ? kBlocks[i % 5] * kBlockWeights
                          : kBlocks[i % 5] * 128 + (i % 4 + 1) * 32;
    check(kRows[i % 6], k, kTokens[i % 11]);
    if (HasFailure()) return;
  }
}

std::string case_name(const testing::TestParamInfo<Case>& info) {
  return std::get<0>(info.param) + "_" + name_of(std::get<1>(info.param));
}
INSTANTIATE_TEST_SUITE_P(All, Blocks,
                         testing::Combine(testing::ValuesIn(available_kernels()),
                                          testing::ValuesIn(kBlockFormats)),
                         case_name);

// Any bits come back, and the tile has no more bytes than before.
TEST(BlockOrder, LosesNothing) {
  Random random(4);
  for (Format format : kBlockFormats) {
    const BlockLayout& layout = *block_layout(format);
    EXPECT_EQ(layout.code_bytes() + layout.word_bytes + layout.half_bytes, layout.block_bytes);
    for (int64_t rows : {1, 7, 64}) {
      const int64_t bytes = row_bytes(format, 3 * layout.weights);
      std::vector<char> tile(rows * bytes), buffer(tile.size());
      for (char& byte : tile) byte = static_cast<char>(random_below(random, 256));
      const std::vector<char> came = tile;
      order_blocks(layout, tile.data(), rows, bytes, buffer.data());
      EXPECT_NE(tile, came);
      restore_blocks(layout, tile.data(), rows, bytes, buffer.data());
      EXPECT_EQ(tile, came) << name_of(format);
    }
  }
}

// Whole layers whose projections have different formats, on several threads.
TEST(BlockLayers, ProjectionsOfDifferentFormats) {
  Random random(5);
  constexpr Extras kBlocks16{.scale_type = ScaleType::kInBlocks, .group = 16};
  constexpr Extras kBlocks32{.scale_type = ScaleType::kInBlocks, .group = 32};
  const Kind kinds[] = {
      {.name = "q4_k_m",
       .format = Format::kQ4KAct8,
       .w13 = kBlocks32,
       .w2 = kBlocks16,
       .w2_format = Format::kQ6KAct8},
      {.name = "q2_k",
       .format = Format::kQ2K,
       .w13 = kBlocks16,
       .w2 = kBlocks16,
       .w2_format = Format::kQ3K},
      {.name = "q5_k_and_int8",
       .format = Format::kQ5KAct8,
       .w13 = kBlocks32,
       .w2 = groups_of(32, ScaleType::kFp16),
       .w2_format = Format::kInt8GroupsAct8},
      {.name = "q5_1_and_iq4_nl",
       .format = Format::kQ51Act8,
       .w13 = kBlocks32,
       .w2 = kBlocks32,
       .w2_format = Format::kIq4NlAct8},
      {.name = "iq4_xs_and_q5_0",
       .format = Format::kIq4Xs,
       .w13 = kBlocks32,
       .w2 = kBlocks32,
       .w2_format = Format::kQ50},
      {.name = "iq2_xxs_and_iq3_s",
       .format = Format::kIq2XxsAct8,
       .w13 = kBlocks32,
       .w2 = kBlocks32,
       .w2_format = Format::kIq3SAct8},
      {.name = "iq1_m_and_iq2_s",
       .format = Format::kIq1M,
       .w13 = kBlocks16,
       .w2 = kBlocks16,
       .w2_format = Format::kIq2S},
      {.name = "gate_q4_k_and_up_q6_k",
       .format = Format::kQ4KAct8,
       .w13 = kBlocks32,
       .w2 = kBlocks16,
       .w2_format = Format::kQ3KAct8,
       .w3_format = Format::kQ6K,
       .w3 = kBlocks16},
      {.name = "gate_int8_and_up_iq2_xs",
       .format = Format::kInt8Groups,
       .weight_on_input = true,
       .w13 = groups_of(32, ScaleType::kFp16),
       .w2 = kBlocks32,
       .w2_format = Format::kQ5KAct8,
       .w3_format = Format::kIq2XsAct8,
       .w3 = kBlocks16},
      {.name = "gate_mxfp4_and_up_bf16",
       .format = Format::kFp4Act8,
       .activation = kGptOss,
       .w13 = kMxScales,
       .w2 = kBlocks32,
       .w2_format = Format::kQ50,
       .w3_format = Format::kBf16,
       .w3 = kWithBias},
  };
  for (const Kind& kind : kinds) {
    TestLayer layer(kind, 3, 512, 256, random);
    ThreadPool pool(parse_topology("2 nodes x 2,1 cores x 1 threads"), {});
    const auto came = [&] {
      return std::tuple(layer.w13.data, layer.w2.data, layer.w3 ? layer.w3->data : MatrixData());
    };
    const auto as_it_came = came();
    order_layer(layer.spec, pool);
    for (int64_t tokens : {1, 9, 70}) {
      TestBatch test(kind, layer, tokens, 2, random);
      const std::vector<double> want = reference(layer, test, test.ids);
      for (const std::string& isa : available_kernels()) {
        Workspace workspace;
        EXPECT_TRUE(
            expert_block(layer.spec, test.batch, kernels_named(isa), pool, workspace).empty());
        double error = 0, size = 0;
        for (size_t i = 0; i < want.size(); ++i) {
          const double got = bf16_to_float(test.y[i]);
          error += (got - want[i]) * (got - want[i]);
          size += want[i] * want[i];
        }
        const bool act8 = is_act8(kind.format) || is_act8(kind.w3_format.value_or(kind.format)) ||
                          is_act8(kind.w2_format.value_or(kind.format));
        EXPECT_LE(std::sqrt(error), (act8 ? 2e-2 : 4e-3) * std::sqrt(size))
            << kind.name << " on " << isa << ", " << tokens << " tokens";
      }
    }
    restore_layer(layer.spec, pool);
    EXPECT_TRUE(came() == as_it_came) << kind.name;
  }
}

}  // namespace
}  // namespace lk

#include "lk/moe.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "lk/choice.h"
#include "lk/testing/allocation_counter.h"
#include "lk/testing/random_layers.h"
#include "lk/testing/reference_block.h"

namespace lk {
namespace {

using namespace test_values;

constexpr const char* kSmallPool = "2 nodes x 2,1 cores x 1 threads";

using Case = std::tuple<std::string, Kind>;

class ExpertBlockOf : public testing::TestWithParam<Case> {};

TEST_P(ExpertBlockOf, MatchesTheReference) {
  const auto& [isa, kind] = GetParam();
  Random random(7);
  ThreadPool pool(parse_topology(kSmallPool), {});
  Workspace workspace;
  TestLayer layer(kind, 3, 200, 150, random);
  order_layer(layer.spec, pool);
  for (int64_t tokens : {1, 3, 33}) {
    TestBatch test(kind, layer, tokens, 2, random);
    if (tokens == 1) test.ids = {2, 0};
    test.batch.ids = test.ids.data();
    expert_block(layer.spec, test.batch, kernels_named(isa), pool, workspace);
    const std::vector<double> want = reference(layer, test, test.ids);
    double squares = 0;
    double error_squares = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      const double error = widen(kind.type, test.y[i]) - want[i];
      squares += want[i] * want[i];
      error_squares += error * error;
    }
    // Rounding to bf16 changes a value by 0.17% on average and by 2^-8 at most. y is rounded to
    // bf16, and on CPUs that multiply bf16 the intermediate is, too. Rounding activations to 8 bits
    // changes them by up to 1/254 of the largest of 32, before both products.
    const double bound = is_act8(kind.format) ? 2e-2 : 4e-3;
    EXPECT_LT(std::sqrt(error_squares / squares), bound) << tokens;
    const double size = std::sqrt(squares / static_cast<double>(want.size()));
    for (size_t i = 0; i < want.size(); ++i) {
      ASSERT_NEAR(widen(kind.type, test.y[i]), want[i], bound * (6 * size + std::abs(want[i])))
          << "element " << i << " of " << tokens << " tokens";
    }
  }
}

// Sets one value of an expert to NaN: a weight, a group or row scale, or a part scale and a bias,
// as `what` is 0, 1 or 2.
void poison(const Kind& kind, const Extras& extras, TestMatrix& matrix, int64_t experts,
            int64_t expert, int what) {
  MatrixData& data = matrix.data;
  const auto in_expert = [&](size_t size) { return expert * size / experts + size / experts / 2; };
  const auto set = [&](std::vector<char>& bytes, auto value) {
    std::memcpy(bytes.data() + in_expert(bytes.size() / sizeof(value)) * sizeof(value), &value,
                sizeof(value));
  };
  const float nan = std::nanf("");
  if (what == 0) {
    if (kind.format == Format::kBf16) set(data.weights, uint16_t{0x7fc0});
    if (kind.format == Format::kFp16) set(data.weights, uint16_t{0xfe00});
    if (kind.format == Format::kFp8) set(data.weights, uint8_t{0xff});
  } else if (what == 1) {
    if (extras.scale_type == ScaleType::kBf16) set(data.scale, uint16_t{0x7fc0});
    if (extras.scale_type == ScaleType::kFp16) set(data.scale, uint16_t{0x7e00});
    if (extras.scale_type == ScaleType::kFloat) set(data.scale, nan);
    if (extras.scale_type == ScaleType::kFloatBlocks) set(data.scale, nan);
    if (extras.scale_type == ScaleType::kE8m0) set(data.scale, uint8_t{0xff});
    if (extras.scale_type == ScaleType::kE4m3) set(data.scale, uint8_t{0x7f});
    if (extras.row_scale) data.row_scale[in_expert(data.row_scale.size())] = nan;
  } else {
    if (extras.part_scale) data.part_scale[in_expert(data.part_scale.size())] = nan;
    if (extras.bias) data.bias[in_expert(data.bias.size())] = nan;
  }
}

TEST_P(ExpertBlockOf, NamesTheRowsThatAreNotFinite) {
  const auto& [isa, kind] = GetParam();
  constexpr int64_t kExperts = 4;
  constexpr int64_t kPoisoned = 2;
  Random random(17);
  ThreadPool pool(parse_topology(kSmallPool), {});
  Workspace workspace;
  int poisons = 0;
  for (int which = 0; which < 6; ++which) {
    TestLayer layer(kind, kExperts, 200, 150, random);
    TestMatrix& matrix = which % 2 == 0 ? layer.w13 : layer.w2;
    const MatrixData before = matrix.data;
    poison(kind, which % 2 == 0 ? kind.w13 : kind.w2, matrix, kExperts, kPoisoned, which / 2);
    if (std::memcmp(before.weights.data(), matrix.data.weights.data(), before.weights.size()) ==
            0 &&
        before.scale == matrix.data.scale && before.row_scale == matrix.data.row_scale &&
        before.part_scale == matrix.data.part_scale && before.bias == matrix.data.bias) {
      continue;  // it has no such thing
    }
    ++poisons;
    order_layer(layer.spec, pool);
    for (int64_t tokens : {1, 40}) {
      TestBatch test(kind, layer, tokens, 2, random);
      if (tokens == 1) test.ids = {kPoisoned, 0};
      test.batch.ids = test.ids.data();
      const std::vector<Fault> faults =
          expert_block(layer.spec, test.batch, kernels_named(isa), pool, workspace);
      std::vector<Fault> want;
      for (int64_t token = 0; token < tokens; ++token) {
        if (test.ids[2 * token] == kPoisoned || test.ids[2 * token + 1] == kPoisoned) {
          want.push_back({token, FaultSource::kExpert, kPoisoned});
        }
      }
      EXPECT_TRUE(faults == want) << "poison " << which << ": " << faults.size() << " faults, not "
                                  << want.size();
    }
  }
  EXPECT_GE(poisons, 2);
}

TEST_P(ExpertBlockOf, TellsAFaultBeforeTheExpertsFromTheirOwn) {
  const auto& [isa, kind] = GetParam();
  Random random(19);
  ThreadPool pool(parse_topology(kSmallPool), {});
  Workspace workspace;
  TestLayer layer(kind, 3, 200, 150, random);
  order_layer(layer.spec, pool);
  TestBatch test(kind, layer, 8, 2, random);
  for (int32_t& id : test.ids) id = 1;
  const bool bf16 = kind.type == Scalar::kBf16;
  test.x[1 * 200 + 33] = bf16 ? 0x7fc0 : 0x7e00;
  test.x[2 * 200 + 199] = bf16 ? 0xff80 : 0xfc00;
  test.x[3 * 200] = 0x7fff;  // has no experts
  test.ids[6] = test.ids[7] = -1;
  test.weights[9] = std::numeric_limits<float>::infinity();
  test.ids[10] = -1;  // its weight does not count
  test.weights[10] = std::nanf("");
  test.weights[13] = kind.weight_on_input ? std::nanf("") : 3e38f;  // too large for y
  const std::vector<Fault> faults =
      expert_block(layer.spec, test.batch, kernels_named(isa), pool, workspace);
  const Fault too_large =
      kind.weight_on_input ? Fault{6, FaultSource::kRouter, 1} : Fault{6, FaultSource::kSum, -1};
  const std::vector<Fault> want{{1, FaultSource::kInput, -1},
                                {2, FaultSource::kInput, -1},
                                {4, FaultSource::kRouter, 1},
                                too_large};
  for (const Fault& fault : faults) {
    EXPECT_TRUE(std::find(want.begin(), want.end(), fault) != want.end())
        << "row " << fault.row << ", source " << static_cast<int>(fault.source);
  }
  EXPECT_EQ(faults.size(), want.size());
}

INSTANTIATE_TEST_SUITE_P(All, ExpertBlockOf,
                         testing::Combine(testing::ValuesIn(available_kernels()),
                                          testing::ValuesIn(kKinds)),
                         [](const auto& info) {
                           return std::get<0>(info.param) + "_" + std::get<1>(info.param).name;
                         });

// Tests that only compare results with each other leave layers in the order that they came in.
class ExpertBlock : public testing::Test {
 protected:
  void run(const TestLayer& layer, const Batch& batch) {
    expert_block(layer.spec, batch, choose_kernels(""), pool_, workspace_);
  }

  const Kind kind_{};
  Random random_{11};
  ThreadPool pool_{parse_topology(kSmallPool), {}};
  Workspace workspace_;
};

#if defined(__x86_64__)
// Random fp8 codes are subnormal in one of 16 cases. The mode is the caller's, and that of threads
// that it creates.
TEST(ExpertBlockModes, SubnormalNumbersCountInAnyMode) {
  constexpr unsigned kSubnormalsAreZeros = 0x8040;  // of MXCSR, for operands and for results
  for (const Kind& kind : kKinds) {
    Random random(13);
    TestLayer layer(kind, 4, 128, 64, random);
    TestBatch test(kind, layer, 7, 2, random);
    ThreadPool usual(parse_topology(kSmallPool), {});
    order_layer(layer.spec, usual);
    Workspace workspace;
    expert_block(layer.spec, test.batch, choose_kernels(""), usual, workspace);
    const std::vector<uint16_t> want = test.y;
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | kSubnormalsAreZeros);
    for (const char* topology : {"1 node x 1 cores x 1 threads", kSmallPool}) {
      ThreadPool pool(parse_topology(topology), {});
      std::ranges::fill(test.y, uint16_t{0});
      expert_block(layer.spec, test.batch, choose_kernels(""), pool, workspace);
      EXPECT_EQ(test.y, want) << kind.name << " on " << topology;
    }
    EXPECT_EQ(_mm_getcsr() & kSubnormalsAreZeros, kSubnormalsAreZeros)
        << "not the caller's any more";
    _mm_setcsr(before);
  }
}
#endif

// The layer has rows for each of 32 nodes, and each pool divides it into other pieces.
TEST_F(ExpertBlock, SameBitsOnAnyPool) {
  for (const Kind& kind : kKinds) {
    const std::string name = kind.name;
    if (name != "bf16" && name != "int8_act8" && name != "int4") continue;
    TestLayer layer(kind, 3, 2100, 200, random_);
    order_layer(layer.spec, pool_);
    TestBatch test(kind, layer, 23, 2, random_);
    std::vector<uint16_t> first;
    for (const char* topology :
         {"1 node x 1 cores x 1 threads", "1 node x 7 cores x 1 threads",
          "4 nodes x 1,2,0,3 cores x 2 threads", "32 nodes x 1 cores x 1 threads"}) {
      ThreadPool pool(parse_topology(topology), {});
      for (int64_t tokens : {1, 23}) {
        test.batch.tokens = tokens;
        expert_block(layer.spec, test.batch, choose_kernels(""), pool, workspace_);
      }
      if (first.empty()) first = test.y;
      EXPECT_EQ(test.y, first) << name << " on " << topology;
    }
  }
}

TEST_F(ExpertBlock, AllocatesNothingAfterTheFirstCall) {
  if (!counts_allocations()) GTEST_SKIP() << "operator new is the sanitizer's";
  TestLayer layer(kind_, 3, 67, 45, random_);
  TestBatch test(kind_, layer, 23, 2, random_);
  const std::vector<int64_t> ids64(test.ids.begin(), test.ids.end());
  test.batch.ids = nullptr;
  test.batch.ids64 = ids64.data();
  const Kernels& kernels = choose_kernels("");
  const auto scratch = [&] {
    const Workspace& w = workspace_;
    return std::tuple(w.ids.data(), w.slots.data(), w.acts.data(), w.inter.data(), w.partial.data(),
                      w.workers.data());
  };
  expert_block(layer.spec, test.batch, kernels, pool_, workspace_);
  const auto scratch_before = scratch();
  const int64_t before = allocations();
  EXPECT_GT(before, 0);
  for (int64_t tokens : {23, 1, 7}) {
    test.batch.tokens = tokens;
    expert_block(layer.spec, test.batch, kernels, pool_, workspace_);
  }
  EXPECT_EQ(allocations(), before);
  EXPECT_TRUE(scratch() == scratch_before);
}

TEST_F(ExpertBlock, AllocatesNothingForWhatIsReserved) {
  if (!counts_allocations()) GTEST_SKIP() << "operator new is the sanitizer's";
  const Kernels& kernels = choose_kernels("");
  for (const Kind& kind : kKinds) {
    TestLayer layer(kind, 5, 67, 45, random_);
    TestBatch test(kind, layer, 23, 3, random_);
    Workspace w;
    reserve_workspace(layer.spec, 23, 3, kernels, pool_, w);
    const auto scratch = [&] {
      return std::tuple(w.expert_begin.data(), w.active.data(), w.slots.data(), w.acts.data(),
                        w.inter.data(), w.partial.data(), w.ones.data(), w.workers.data());
    };
    const auto reserved = scratch();
    const int64_t before = allocations();
    for (int64_t tokens : {5, 23, 1}) {
      test.batch.tokens = tokens;
      expert_block(layer.spec, test.batch, kernels, pool_, w);
    }
    EXPECT_EQ(allocations(), before) << kind;
    EXPECT_TRUE(scratch() == reserved) << kind;
  }
}

TEST_F(ExpertBlock, RefusesIdsThatAreNoExperts) {
  TestLayer layer(kind_, 3, 8, 8, random_);
  TestBatch test(kind_, layer, 4, 2, random_);
  // Cut to 32 bits, the last id would be expert 0.
  for (int64_t wrong : {int64_t{-2}, int64_t{3}, int64_t{1} << 30, int64_t{1} << 32}) {
    std::vector<int64_t> ids64(test.ids.begin(), test.ids.end());
    ids64[5] = wrong;
    std::vector<int32_t> ids(ids64.begin(), ids64.end());
    for (bool wide : {true, false}) {
      if (!wide && ids[5] != wrong) continue;
      test.batch.ids = wide ? nullptr : ids.data();
      test.batch.ids64 = wide ? ids64.data() : nullptr;
      try {
        run(layer, test.batch);
        ADD_FAILURE() << wrong;
      } catch (const std::invalid_argument& error) {
        EXPECT_EQ(error.what(),
                  "topk_ids[2, 1] is " + std::to_string(wrong) + ", must be -1 (skip) to 2");
      }
      EXPECT_EQ(test.y, std::vector<uint16_t>(test.y.size(), 0xffff));
    }
  }
}

TEST_F(ExpertBlock, TokensWithoutExpertsBecomeZero) {
  TestLayer layer(kind_, 3, 67, 45, random_);
  TestBatch test(kind_, layer, 5, 2, random_);
  std::fill(test.ids.begin(), test.ids.end(), -1);
  run(layer, test.batch);
  EXPECT_EQ(test.y, std::vector<uint16_t>(test.y.size(), 0));
}

TEST_F(ExpertBlock, NoTokens) {
  TestLayer layer(kind_, 3, 67, 45, random_);
  Batch empty;
  empty.topk = 2;
  run(layer, empty);
}

TEST_F(ExpertBlock, RowsOfXMayBeFarApart) {
  constexpr int64_t kHidden = 67;
  constexpr int64_t kStride = 80;
  TestLayer layer(kind_, 3, kHidden, 45, random_);
  TestBatch test(kind_, layer, 9, 2, random_);
  run(layer, test.batch);
  const std::vector<uint16_t> want = std::exchange(test.y, {});
  std::vector<uint16_t> apart(8 * kStride + kHidden, 0xffff);  // NaN between
  for (int64_t token = 0; token < 9; ++token) {
    std::copy_n(test.x.begin() + token * kHidden, kHidden, apart.begin() + token * kStride);
  }
  test.y.assign(want.size(), 0xffff);
  test.batch.y = test.y.data();
  test.batch.x = apart.data();
  test.batch.x_stride = kStride;
  run(layer, test.batch);
  EXPECT_EQ(test.y, want);
}

TEST_F(ExpertBlock, IdsOf64Bits) {
  TestLayer layer(kind_, 3, 67, 45, random_);
  TestBatch test(kind_, layer, 9, 2, random_);
  run(layer, test.batch);
  const std::vector<uint16_t> want = test.y;
  std::fill(test.y.begin(), test.y.end(), 0xffff);
  const std::vector<int64_t> ids64(test.ids.begin(), test.ids.end());
  test.batch.ids = nullptr;
  test.batch.ids64 = ids64.data();
  run(layer, test.batch);
  EXPECT_EQ(test.y, want);
}

// A batch has more slots than fit into the scratch memory of one pass, and more tokens for each
// expert than are multiplied with a tile at a time. It gives the same bits as calls of 100 tokens.
TEST_F(ExpertBlock, SeveralPasses) {
  constexpr int64_t kTokens = 1400;
  constexpr int64_t kTopk = 32;
  constexpr int64_t kHidden = 2048;
  static_assert(kTokens * kTopk * kHidden * sizeof(float) > 256 << 20);
  TestLayer layer(kind_, 2, kHidden, 34, random_);
  order_layer(layer.spec, pool_);
  TestBatch test(kind_, layer, kTokens, kTopk, random_);
  // Each token has few experts, in random slots.
  for (int64_t slot = 0; slot < kTokens * kTopk; ++slot) {
    if (random_below(random_, kTopk) != 0) test.ids[slot] = -1;
  }
  run(layer, test.batch);
  const std::vector<uint16_t> want = test.y;
  std::fill(test.y.begin(), test.y.end(), 0xffff);
  for (int64_t first = 0; first < kTokens; first += 100) {
    Batch few = test.batch;
    few.tokens = 100;
    few.x = test.x.data() + first * kHidden;
    few.ids += first * kTopk;
    few.weights += first * kTopk;
    few.y = test.y.data() + first * kHidden;
    run(layer, few);
  }
  EXPECT_EQ(test.y, want);

  // In the last pass, rows are still counted from the first token of the batch.
  constexpr int64_t kRow = kTokens - 2;
  test.x[kRow * kHidden + 5] = 0x7fc0;
  test.ids[kRow * kTopk] = 1;
  const std::vector<Fault> faults =
      expert_block(layer.spec, test.batch, choose_kernels(""), pool_, workspace_);
  EXPECT_TRUE(faults == std::vector<Fault>({{kRow, FaultSource::kInput, -1}}));
}

}  // namespace
}  // namespace lk

#include "lk/nan_weights.h"

#include <gtest/gtest.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "lk/testing/random_layers.h"

namespace lk {
namespace {

using namespace test_values;

constexpr int64_t kExperts = 3;

class NanWeights : public testing::TestWithParam<Kind> {};

// The scale that the kernels read for a weight.
float scale_of(const Matrix& m, int64_t expert, int64_t part, int64_t row, int64_t column) {
  const int64_t in_tile = row % kTileRows;
  const MatmulArgs args = m.product(expert, part, row - in_tile);
  const Epilogue epilogue = m.epilogue(expert, part, row);
  float scale = epilogue.scale * (epilogue.row_scale ? *epilogue.row_scale : 1.0f);
  if (args.scale_type == ScaleType::kFloatBlocks) {
    const int64_t group = column / args.group;
    scale *= in_tile < args.block_end ? static_cast<const float*>(args.scale)[group]
                                      : args.next_block_scale[group];
  }
  return scale;
}

// Weights of three experts are NaN, with either sign; those that share a scale with one of them
// have NaN as their scale, and all others have not.
TEST_P(NanWeights, MakeTheirScaleNaN) {
  const Kind& kind = GetParam();
  const Extras& extras = kind.w13;
  const bool blocks = extras.scale_type == ScaleType::kFloatBlocks;
  ThreadPool pool(parse_topology("2 nodes x 2,1 cores x 1 threads"), {});
  Random random(7);
  for (const auto& [rows, k] : std::vector<std::pair<int64_t, int64_t>>{{128, 256}, {150, 131}}) {
    TestMatrix matrix(kind.format, kExperts, 2, rows, k, kind.interleaved, extras, random);
    // Which weights share a scale: an expert, a row as it came, and a column, each divided by how
    // many of them share one.
    using Place = std::tuple<int64_t, int64_t, int64_t>;
    const auto shared = [&](int64_t expert, int64_t row, int64_t column) -> Place {
      if (blocks) return {expert, row / 128, column / 128};
      return {expert, extras.row_scale ? row : 0, 0};
    };
    std::vector<Place> poisoned;
    for (int64_t expert : {0, 2, 2}) {
      const int64_t row = random_below(random, 2 * rows);
      const int64_t column = random_below(random, k);
      set_code(kind.format, matrix.data.weights.data() + (expert * 2 * rows + row) * k, column,
               poisoned.empty() ? 0x7f : 0xff);
      poisoned.push_back(shared(expert, row, column));
    }
    const Matrix m = matrix.spec();
    order_matrix(m, kExperts, pool);
    for (int64_t expert = 0; expert < kExperts; ++expert) {
      for (int64_t part = 0; part < 2; ++part) {
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t column = 0; column < k; ++column) {
            const Place place = shared(expert, matrix.row_as_it_came(part, row), column);
            const bool want = std::ranges::find(poisoned, place) != poisoned.end();
            ASSERT_EQ(std::isnan(scale_of(m, expert, part, row, column)), want)
                << expert << " " << part << " " << row << " " << column;
          }
        }
      }
    }
  }
}

std::vector<Kind> kinds_of_fp8() {
  std::vector<Kind> kinds;
  for (const Kind& kind : kKinds) {
    if (kind.format == Format::kFp8) kinds.push_back(kind);
  }
  return kinds;
}

INSTANTIATE_TEST_SUITE_P(All, NanWeights, testing::ValuesIn(kinds_of_fp8()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace lk

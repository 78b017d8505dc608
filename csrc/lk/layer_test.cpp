#include "lk/layer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "lk/testing/random_layers.h"

namespace lk {
namespace {

using namespace test_values;

constexpr int64_t kExperts = 2;

// The bytes of one row, gathered from its tile.
std::vector<char> gather_row(const MatmulArgs& args, int64_t row) {
  const int64_t whole = args.row_bytes / kUnitBytes * kUnitBytes;
  const int64_t rest_bytes = args.row_bytes - whole;
  std::vector<char> bytes;
  for (int64_t at = 0; at < whole; at += kUnitBytes) {
    const char* unit = args.tile + at * args.rows + row * kUnitBytes;
    bytes.insert(bytes.end(), unit, unit + kUnitBytes);
  }
  const char* rest = args.tile + whole * args.rows + row * rest_bytes;
  bytes.insert(bytes.end(), rest, rest + rest_bytes);
  return bytes;
}

// The value of a weight, with the scales where the kernels read them.
double value_of(const MatmulArgs& args, const Epilogue& epilogue, Format format,
                const std::vector<char>& bytes, int64_t row, int64_t k) {
  const int64_t group = args.group == 0 ? 0 : k / args.group;
  double value = code_value(format, get_code(format, bytes.data(), k));
  if (args.zero) value -= args.zero[group * args.rows + row] - 8;
  if (args.scale_type == ScaleType::kFloatBlocks) {
    value *= row < args.block_end ? static_cast<const float*>(args.scale)[group]
                                  : args.next_block_scale[group];
  } else if (args.group != 0) {
    value *= scale_value(args.scale_type, args.scale, group * args.rows + row);
  }
  return value * (epilogue.row_scale ? epilogue.row_scale[row] : 1.0f) * epilogue.scale;
}

// Compares the tile whose first row is `row` of a part with the rows that came.
void check_product(const TestMatrix& test, const MatrixData& came, const Matrix& m, Format format,
                   int64_t expert, int64_t part, int64_t row) {
  SCOPED_TRACE(testing::Message() << "expert " << expert << ", part " << part << ", row " << row);
  const MatmulArgs args = m.product(expert, part, row);
  EXPECT_EQ(args.tile, m.tile(expert, part, row));
  EXPECT_EQ(args.rows, std::min(kTileRows, m.rows - row));
  EXPECT_EQ(args.k, m.k);
  EXPECT_EQ(args.row_bytes, m.row_bytes);
  const Epilogue epilogue = m.epilogue(expert, part, row);
  for (int64_t r = 0; r < args.rows; ++r) {
    const std::vector<char> bytes = gather_row(args, r);
    for (int64_t k = 0; k < m.k; ++k) {
      const int64_t at = ((expert * m.parts + part) * m.rows + row + r) * m.k + k;
      ASSERT_EQ(value_of(args, epilogue, format, bytes, r, k), test.values[at]) << r << " " << k;
    }
    ASSERT_EQ(epilogue.bias != nullptr, !came.bias.empty());
    if (epilogue.bias) {
      ASSERT_EQ(epilogue.bias[r],
                came.bias[expert * m.parts * m.rows + test.row_as_it_came(part, row + r)]);
    }
  }
}

void check_matrix(const TestMatrix& test, const MatrixData& came, const Matrix& m, Format format) {
  for (int64_t expert = 0; expert < kExperts; ++expert) {
    for (int64_t part = 0; part < m.parts; ++part) {
      for (int64_t row = 0; row < m.rows; row += kTileRows) {
        check_product(test, came, m, format, expert, part, row);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

class Layer : public testing::TestWithParam<Kind> {};

TEST_P(Layer, OrderedRowsAreWhereProductsLookAndComeBack) {
  const Kind& kind = GetParam();
  Random random(5);
  // Some sizes make whole tiles and whole blocks of scales. With others, the rows of a block end
  // within a tile, or a block has rows of gate and up.
  for (const auto& [hidden, intermediate] :
       std::vector<std::pair<int64_t, int64_t>>{{128, 64}, {150, 90}, {258, 46}, {6, 2}}) {
    for (const char* topology :
         {"1 node x 1 cores x 1 threads", "2 nodes x 2,1 cores x 1 threads"}) {
      SCOPED_TRACE(testing::Message() << hidden << " " << intermediate << " on " << topology);
      ThreadPool pool(parse_topology(topology), {});
      TestLayer layer(kind, kExperts, hidden, intermediate, random);
      const MatrixData w13 = layer.w13.data;
      const MatrixData w2 = layer.w2.data;
      const MatrixData w3 = layer.w3 ? layer.w3->data : MatrixData();
      order_layer(layer.spec, pool);
      if (intermediate > 2) {
        EXPECT_NE(layer.w13.data.weights, w13.weights);
        EXPECT_NE(layer.w2.data.weights, w2.weights);
      }
      check_matrix(layer.w13, w13, layer.spec.w13, kind.format);
      check_matrix(layer.w2, w2, layer.spec.w2, kind.format);
      if (layer.w3) check_matrix(*layer.w3, w3, layer.spec.w3, *kind.w3_format);
      restore_layer(layer.spec, pool);
      EXPECT_TRUE(layer.w13.data == w13);
      EXPECT_TRUE(layer.w2.data == w2);
      EXPECT_TRUE(!layer.w3 || layer.w3->data == w3);
      if (HasFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Layer, testing::ValuesIn(kKinds),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace lk

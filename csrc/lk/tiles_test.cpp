#include "lk/tiles.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace lk {
namespace {

TEST(Tiles, OrderAndBack) {
  std::mt19937 random(1);
  for (int64_t unit : {1, 2, 4}) {
    for (int64_t rows : {1, 2, 15, 16, 17, 45, 63, 64}) {
      for (int64_t bytes : {1, 2, 3, 4, 5, 7, 8, 64, 66, 131}) {
        std::vector<char> matrix(rows * bytes);
        for (char& value : matrix) value = static_cast<char>(random());
        std::vector<char> want;
        const int64_t rest = bytes % unit;
        for (int64_t at = 0; at < bytes - rest; at += unit) {
          for (int64_t row = 0; row < rows; ++row) {
            const auto from = matrix.begin() + row * bytes + at;
            want.insert(want.end(), from, from + unit);
          }
        }
        for (int64_t row = 0; row < rows; ++row) {
          const auto end = matrix.begin() + (row + 1) * bytes;
          want.insert(want.end(), end - rest, end);
        }
        std::vector<char> tile = matrix;
        std::vector<char> buffer(tile.size());
        tile_in_place(tile.data(), rows, bytes, unit, buffer.data());
        EXPECT_EQ(tile, want) << unit << " " << rows << " " << bytes;
        untile_in_place(tile.data(), rows, bytes, unit, buffer.data());
        EXPECT_EQ(tile, matrix) << unit << " " << rows << " " << bytes;
      }
    }
  }
}

TEST(Tiles, CountAndSizes) {
  EXPECT_EQ(tile_count(0), 0);
  EXPECT_EQ(tile_count(64), 1);
  EXPECT_EQ(tile_count(65), 2);
  EXPECT_EQ(tile_rows(0, 65), 64);
  EXPECT_EQ(tile_rows(1, 65), 1);
  EXPECT_EQ(tile_offset(2, 10), 1280);
}

}  // namespace
}  // namespace lk

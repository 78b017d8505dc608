// Which node owns which rows of a matrix. The node that owns rows computes them and has them in its
// memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "lk/integers.h"

namespace lk {

// Nodes own whole tiles of this many rows. A tile is stored transposed (the first bytes of all its
// rows, then the next bytes of all of them), so the bytes of a single row are not in one place.
constexpr int64_t kTileRows = 64;

// The first row that a node owns, a multiple of kTileRows; `rows` for the number after the last
// node. Nodes own tiles in proportion to their workers, to within one tile of the exact share.
inline int64_t first_row(int64_t rows, const std::vector<int>& node_workers, int node) {
  const auto begin = node_workers.begin();
  const int64_t before = std::accumulate(begin, begin + node, int64_t{0});
  const int64_t workers = std::accumulate(begin, node_workers.end(), int64_t{0});
  const int64_t tiles = ceil_div(rows, kTileRows);
  return std::min(tiles * before / workers * kTileRows, rows);
}

// The bounds between nodes: node n owns rows [bounds[n], bounds[n + 1]).
inline std::vector<int64_t> divide_rows(int64_t rows, const std::vector<int>& node_workers) {
  std::vector<int64_t> bounds;
  for (int node = 0; node <= static_cast<int>(node_workers.size()); ++node) {
    bounds.push_back(first_row(rows, node_workers, node));
  }
  return bounds;
}

}  // namespace lk

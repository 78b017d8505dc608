// Which node owns which rows: the same answer for who computes them and for where they lie.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

namespace lk {

// The first of `rows` that node `node` owns; for the number after the last node, the end. Nodes own
// rows in proportion to their workers.
inline int64_t first_row(int64_t rows, const std::vector<int>& node_workers, int node) {
  const auto begin = node_workers.begin();
  const int64_t before = std::accumulate(begin, begin + node, int64_t{0});
  return rows * before / std::accumulate(begin, node_workers.end(), int64_t{0});
}

// Bounds of the division: node n owns rows [bounds[n], bounds[n + 1]).
inline std::vector<int64_t> divide_rows(int64_t rows, const std::vector<int>& node_workers) {
  std::vector<int64_t> bounds;
  for (int node = 0; node <= static_cast<int>(node_workers.size()); ++node) {
    bounds.push_back(first_row(rows, node_workers, node));
  }
  return bounds;
}

}  // namespace lk

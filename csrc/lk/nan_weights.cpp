#include "lk/nan_weights.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "lk/integers.h"

namespace lk {
namespace {

// Whether a code of e4m3fn is NaN: all bits but the sign are ones. Without an early end, so that
// the compiler makes vectors of it.
bool any_nan(const uint8_t* codes, int64_t n) {
  uint8_t any = 0;
  for (int64_t i = 0; i < n; ++i) any |= (codes[i] & 0x7f) == 0x7f;
  return any != 0;
}

// The scale that a weight shares with others. `row` counts all parts' rows of an expert.
float* scale_of(const Matrix& m, int64_t expert, int64_t row, int64_t column) {
  const int64_t rows = m.parts * m.rows;
  if (m.scale_type == ScaleType::kFloatBlocks) {
    const int64_t block = expert * ceil_div(rows, kScaleBlock) + row / kScaleBlock;
    return reinterpret_cast<float*>(m.scale) + block * ceil_div(m.k, kScaleBlock) +
           column / kScaleBlock;
  }
  if (m.row_scale) return m.row_scale + expert * rows + row;
  const int64_t part = m.interleaved ? row % m.parts : row / m.rows;
  return m.part_scale + (m.shared_part_scale ? expert : expert * m.parts + part);
}

}  // namespace

void mark_nan_weights(const Matrix& matrix, int64_t experts, ThreadPool& pool) {
  if (matrix.format != Format::kFp8) return;
  const int64_t rows = matrix.parts * matrix.rows;
  const int64_t blocks = ceil_div(rows, kScaleBlock);
  for_each_index(pool, experts * blocks, [&](int64_t index, int) {
    const int64_t expert = index / blocks;
    const int64_t first = index % blocks * kScaleBlock;
    for (int64_t row = first; row < std::min(first + kScaleBlock, rows); ++row) {
      const auto* codes = reinterpret_cast<const uint8_t*>(matrix.weights) +
                          (expert * rows + row) * matrix.row_bytes;
      for (int64_t column = 0; column < matrix.k; column += kScaleBlock) {
        if (!any_nan(codes + column, std::min(kScaleBlock, matrix.k - column))) continue;
        // Workers may mark the same scale.
        std::atomic_ref(*scale_of(matrix, expert, row, column))
            .store(std::numeric_limits<float>::quiet_NaN(), std::memory_order_relaxed);
      }
    }
  });
}

}  // namespace lk

#include "lk/layer.h"

#include <cstring>
#include <vector>

#include "lk/blocks.h"
#include "lk/integers.h"
#include "lk/nan_weights.h"

namespace lk {
namespace {

// An array of a matrix with a row of bytes for each row of weights of all experts.
struct RowArray {
  char* data;
  int64_t row_bytes;
  int64_t unit;  // of tiles; 0: rows are not put into tiles, only de-interleaved
};

std::vector<RowArray> arrays_of(const Matrix& m) {
  std::vector<RowArray> arrays{{m.weights, m.row_bytes, kUnitBytes}};
  if (m.scale && m.scale_type != ScaleType::kFloatBlocks) {
    arrays.push_back({m.scale, m.groups() * m.scale_bytes(), m.scale_bytes()});
  }
  if (m.zero) arrays.push_back({reinterpret_cast<char*>(m.zero), m.groups(), 1});
  if (m.row_scale) arrays.push_back({reinterpret_cast<char*>(m.row_scale), 4, 0});
  if (m.bias) arrays.push_back({reinterpret_cast<char*>(m.bias), 4, 0});
  return arrays;
}

// Calls work(index, buffer) for each index below `count`, on all workers. Each worker has a buffer
// of its own.
template <class Work>
void with_buffers(ThreadPool& pool, int64_t count, int64_t buffer_bytes, Work&& work) {
  std::vector<std::vector<char>> buffers(pool.size(), std::vector<char>(buffer_bytes));
  for_each_index(pool, count,
                 [&](int64_t index, int worker) { work(index, buffers[worker].data()); });
}

// Puts the arrays of a matrix into tile order, or back.
void tile_matrix(const Matrix& m, int64_t experts, bool back, ThreadPool& pool) {
  const BlockLayout* const blocks = block_layout(m.format);
  for (const RowArray& array : arrays_of(m)) {
    if (array.unit == 0) continue;
    const int64_t tiles = tile_count(m.rows);
    with_buffers(pool, experts * m.parts * tiles, kTileRows * array.row_bytes,
                 [&](int64_t index, char* buffer) {
                   const int64_t tile = index % tiles;
                   char* begin = array.data + index / tiles * m.rows * array.row_bytes +
                                 tile_offset(tile, array.row_bytes);
                   const int64_t rows = tile_rows(tile, m.rows);
                   if (blocks != nullptr && array.data == m.weights) {
                     const auto reorder = back ? restore_blocks : order_blocks;
                     reorder(*blocks, begin, rows, array.row_bytes, buffer);
                   } else {
                     const auto reorder = back ? untile_in_place : tile_in_place;
                     reorder(begin, rows, array.row_bytes, array.unit, buffer);
                   }
                 });
  }
}

// Puts rows 0, 2, 4 ... of each expert before rows 1, 3, 5 ..., or back.
void deinterleave(const Matrix& m, int64_t experts, bool back, ThreadPool& pool) {
  for (const RowArray& array : arrays_of(m)) {
    const int64_t rows = 2 * m.rows;
    with_buffers(pool, experts, rows * array.row_bytes, [&](int64_t expert, char* buffer) {
      char* data = array.data + expert * rows * array.row_bytes;
      std::memcpy(buffer, data, rows * array.row_bytes);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t sorted = row % 2 * m.rows + row / 2;
        std::memcpy(data + (back ? row : sorted) * array.row_bytes,
                    buffer + (back ? sorted : row) * array.row_bytes, array.row_bytes);
      }
    });
  }
}

}  // namespace

int64_t Matrix::scale_bytes() const {
  switch (scale_type) {
    case ScaleType::kNone:
    case ScaleType::kInBlocks:
      return 0;
    case ScaleType::kBf16:
    case ScaleType::kFp16:
      return 2;
    case ScaleType::kE8m0:
    case ScaleType::kE4m3:
      return 1;
    default:
      return 4;
  }
}

const char* Matrix::tile(int64_t expert, int64_t part, int64_t row) const {
  return weights + ((expert * parts + part) * rows + row) * row_bytes;
}

MatmulArgs Matrix::product(int64_t expert, int64_t part, int64_t row) const {
  MatmulArgs args;
  args.tile = tile(expert, part, row);
  args.rows = tile_rows(row / kTileRows, rows);
  args.k = k;
  args.row_bytes = row_bytes;
  args.scale_type = scale_type;
  args.group = group;
  if (const BlockLayout* const blocks = block_layout(format)) {
    const int64_t count = blocks->blocks(row_bytes);
    args.row_bytes = count * blocks->code_bytes();
    const char* const words = args.tile + args.rows * args.row_bytes;
    args.scale = words;
    args.halves = words + args.rows * count * blocks->word_bytes;
  } else if (scale_type == ScaleType::kFloatBlocks) {
    const int64_t columns = ceil_div(k, kScaleBlock);
    const int64_t first = part * rows + row;
    // If gate and up came interleaved, they share blocks: row r of a part was row 2 r + part.
    const int64_t block = interleaved ? row / (kScaleBlock / 2) : first / kScaleBlock;
    const auto* scales = reinterpret_cast<const float*>(scale) +
                         (expert * ceil_div(parts * rows, kScaleBlock) + block) * columns;
    args.scale = scales;
    const int64_t end = interleaved ? args.rows : (block + 1) * kScaleBlock - first;
    args.block_end = end < args.rows ? end : kTileRows;
    args.next_block_scale = scales + columns;
  } else if (group != 0) {
    const int64_t at = ((expert * parts + part) * rows + row) * groups();
    args.scale = scale + at * scale_bytes();
    if (zero) args.zero = zero + at;
  }
  return args;
}

Epilogue Matrix::epilogue(int64_t expert, int64_t part, int64_t row) const {
  const int64_t at = (expert * parts + part) * rows + row;
  Epilogue epilogue;
  if (row_scale) epilogue.row_scale = row_scale + at;
  if (part_scale) epilogue.scale = part_scale[shared_part_scale ? expert : expert * parts + part];
  if (bias) epilogue.bias = bias + at;
  return epilogue;
}

void order_matrix(const Matrix& matrix, int64_t experts, ThreadPool& pool) {
  mark_nan_weights(matrix, experts, pool);
  if (matrix.interleaved) deinterleave(matrix, experts, false, pool);
  tile_matrix(matrix, experts, false, pool);
}

void order_layer(const LayerSpec& layer, ThreadPool& pool) {
  order_matrix(layer.w13, layer.experts, pool);
  if (layer.has_w3()) order_matrix(layer.w3, layer.experts, pool);
  order_matrix(layer.w2, layer.experts, pool);
}

void restore_layer(const LayerSpec& layer, ThreadPool& pool) {
  tile_matrix(layer.w13, layer.experts, true, pool);
  if (layer.has_w3()) tile_matrix(layer.w3, layer.experts, true, pool);
  tile_matrix(layer.w2, layer.experts, true, pool);
  if (layer.w13.interleaved) deinterleave(layer.w13, layer.experts, true, pool);
}

}  // namespace lk

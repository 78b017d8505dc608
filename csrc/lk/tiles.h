// The order of weights in memory: tiles of 64 rows, transposed in units of four bytes.
//
// A matrix of `rows` rows of row_bytes bytes is cut into tiles of kTileRows rows; the last tile may
// have fewer. A tile of n rows holds the first four bytes of all n rows, then the next four bytes
// of all n rows, and so on. If row_bytes is no multiple of four, the remaining bytes are at the end
// of the tile, row after row. So a vector of 64 bytes holds the same weights along K for 16 rows:
// outputs are in vector lanes, nothing is summed across a vector, and one multiplication applies 16
// group scales. Four vectors side by side make four independent sums, enough to hide the latency of
// an FMA, from one linear stream of memory. AMX wants its B operand in the same order.
#pragma once

#include <cstdint>

#include "lk/rows.h"

namespace lk {

constexpr int64_t kLanes = 16;     // rows in a vector
constexpr int64_t kUnitBytes = 4;  // consecutive bytes of a row

// Where a tile begins, in bytes from the first tile.
inline int64_t tile_offset(int64_t tile, int64_t row_bytes) { return tile * kTileRows * row_bytes; }
// How many rows a tile has.
inline int64_t tile_rows(int64_t tile, int64_t rows) {
  const int64_t left = rows - tile * kTileRows;
  return left < kTileRows ? left : kTileRows;
}
inline int64_t tile_count(int64_t rows) { return ceil_div(rows, kTileRows); }

// Puts one tile of row-major bytes into tile order, or back. `unit` is kUnitBytes for weights, and
// the size of an element for scales and zero points. `buffer` has room for a copy of the tile.
void tile_in_place(char* tile, int64_t rows, int64_t row_bytes, int64_t unit, char* buffer);
void untile_in_place(char* tile, int64_t rows, int64_t row_bytes, int64_t unit, char* buffer);

}  // namespace lk

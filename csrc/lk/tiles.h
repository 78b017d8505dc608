// The order of weights in memory: tiles of 64 rows, transposed in units of four bytes.
//
// A matrix of `rows` rows of row_bytes bytes is cut into tiles of kTileRows rows, the last of which
// may have less. In a tile of n rows come the first four bytes of all n rows, then the next four
// of all n, and so on; what is left of rows that are no multiple of four bytes stands at the end,
// row after row. So a vector of 64 bytes holds as many weights along K of 16 rows: outputs lie in
// vector lanes, nothing is summed across a vector, and one multiplication applies 16 group scales.
// Four vectors side by side make four independent sums, enough for the latency of an FMA, of one
// linear stream. AMX wants its B operand in the same order.
#pragma once

#include <cstdint>

#include "lk/rows.h"

namespace lk {

constexpr int64_t kLanes = 16;     // rows in one vector
constexpr int64_t kUnitBytes = 4;  // of a row, side by side

// Where a tile begins, in bytes from the first, and how many rows it has.
inline int64_t tile_offset(int64_t tile, int64_t row_bytes) { return tile * kTileRows * row_bytes; }
inline int64_t tile_rows(int64_t tile, int64_t rows) {
  const int64_t left = rows - tile * kTileRows;
  return left < kTileRows ? left : kTileRows;
}
inline int64_t tile_count(int64_t rows) { return ceil_div(rows, kTileRows); }

// Turns one tile of row-major bytes into tile order, or back. unit is kUnitBytes for weights; for
// scales and zero points the size of an element. `buffer` holds the tile while it is turned.
void tile_in_place(char* tile, int64_t rows, int64_t row_bytes, int64_t unit, char* buffer);
void untile_in_place(char* tile, int64_t rows, int64_t row_bytes, int64_t unit, char* buffer);

}  // namespace lk

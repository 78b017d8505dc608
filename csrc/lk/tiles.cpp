#include "lk/tiles.h"

#include <cstring>

namespace lk {
namespace {

// out[c][r] = in[r][c] for elements of type T. Working in blocks of 16 x 16 keeps both sides in few
// cache lines.
template <class T>
void transpose(const char* in, int64_t in_stride, char* out, int64_t out_stride, int64_t rows,
               int64_t columns) {
  constexpr int64_t kBlock = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += kBlock) {
    const int64_t r1 = r0 + kBlock < rows ? r0 + kBlock : rows;
    for (int64_t c0 = 0; c0 < columns; c0 += kBlock) {
      const int64_t c1 = c0 + kBlock < columns ? c0 + kBlock : columns;
      for (int64_t c = c0; c < c1; ++c) {
        for (int64_t r = r0; r < r1; ++r) {
          std::memcpy(out + c * out_stride + r * sizeof(T), in + r * in_stride + c * sizeof(T),
                      sizeof(T));
        }
      }
    }
  }
}

void transpose(int64_t unit, const char* in, int64_t in_stride, char* out, int64_t out_stride,
               int64_t rows, int64_t columns) {
  switch (unit) {
    case 1:
      return transpose<uint8_t>(in, in_stride, out, out_stride, rows, columns);
    case 2:
      return transpose<uint16_t>(in, in_stride, out, out_stride, rows, columns);
    default:
      return transpose<uint32_t>(in, in_stride, out, out_stride, rows, columns);
  }
}

}  // namespace

void tile_in_place(char* tile, int64_t rows, int64_t row_bytes, int64_t unit, char* buffer) {
  const int64_t units = row_bytes / unit;
  const int64_t rest = row_bytes % unit;
  std::memcpy(buffer, tile, rows * row_bytes);
  transpose(unit, buffer, row_bytes, tile, rows * unit, rows, units);
  for (int64_t r = 0; rest != 0 && r < rows; ++r) {
    std::memcpy(tile + rows * units * unit + r * rest, buffer + r * row_bytes + units * unit, rest);
  }
}

void untile_in_place(char* tile, int64_t rows, int64_t row_bytes, int64_t unit, char* buffer) {
  const int64_t units = row_bytes / unit;
  const int64_t rest = row_bytes % unit;
  std::memcpy(buffer, tile, rows * row_bytes);
  transpose(unit, buffer, rows * unit, tile, row_bytes, units, rows);
  for (int64_t r = 0; rest != 0 && r < rows; ++r) {
    std::memcpy(tile + r * row_bytes + units * unit, buffer + rows * units * unit + r * rest, rest);
  }
}

}  // namespace lk

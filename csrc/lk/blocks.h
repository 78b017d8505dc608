// Formats whose rows are sequences of blocks: the K-quants of GGUF, as ggml defines them.
//
// A block holds 256 codes of 2 to 6 bits, one scale for each group of 16 or 32 of them in 4 to 8
// bits, and what all of these are multiplied by in fp16. Q2_K, Q4_K and Q5_K also have a minimum
// for each group, which is subtracted from its weights.
//
//   format   bytes   weight
//   Q2_K     84      d * scale * code - dmin * min       groups of 16, scale and min in 4 bits
//   Q3_K     110     d * (scale - 32) * (code - 4)       groups of 16, scale in 6 bits
//   Q4_K     144     d * scale * code - dmin * min       groups of 32, scale and min in 6 bits
//   Q5_K     176     d * scale * code - dmin * min       groups of 32, scale and min in 6 bits
//   Q6_K     210     d * scale * (code - 32)             groups of 16, scale in 8 bits, signed
//
// In a file the codes of a byte belong to different groups. The kernels want those of one group
// side by side, so a tile is reordered in place, without loss: first all codes, in units of 16
// weights, then what the scales are made from, in words of four bytes, then in halves of two bytes.
// All three are transposed as other weights are (tiles.h): the first word of all rows, then the
// next one. The number of bytes stays the same.
//
// A unit holds up to three planes of bits. Its weights are multiplied in four steps of four bytes.
// Byte b of step t is weight code_place(b, t):
//   4 bits: two words. Step t is the low nibbles (t even) or the high ones of word t / 2.
//   2 bits: a word. Step t is bits 2t and 2t + 1 of each byte.
//   1 bit: two bytes. Step t of byte b is bit 4b + t.
#pragma once

#include <cstdint>

#include "lk/kernels.h"
#include "lk/tiles.h"

namespace lk {

constexpr int64_t kBlockWeights = 256;
constexpr int64_t kCodeUnit = 16;  // weights

constexpr int64_t code_place(int64_t byte, int64_t step) {
  return step / 2 * 8 + 2 * byte + step % 2;
}

struct BlockLayout {
  int bits;             // of a code
  int64_t group;        // weights with one scale
  int64_t block_bytes;  // in the file
  int64_t word_bytes;   // of these, for scales and minimums in words
  int64_t half_bytes;   // and in halves
  // Turns a block of the file into 256 codes, a byte each, followed by its words and halves; and
  // back.
  void (*split)(const uint8_t* block, uint8_t* codes, uint8_t* rest);
  void (*join)(const uint8_t* codes, const uint8_t* rest, uint8_t* block);

  int64_t unit_bytes() const { return kCodeUnit * bits / 8; }
  int64_t code_bytes() const { return kBlockWeights * bits / 8; }
  int64_t blocks(int64_t row_bytes) const { return row_bytes / block_bytes; }
};

// The layout of a format, or null if it has no blocks.
const BlockLayout* block_layout(Format format);

// Puts a tile of row-major blocks into the order of the kernels, or back. `buffer` has room for a
// copy of the tile.
void order_blocks(const BlockLayout& layout, char* tile, int64_t rows, int64_t row_bytes,
                  char* buffer);
void restore_blocks(const BlockLayout& layout, char* tile, int64_t rows, int64_t row_bytes,
                    char* buffer);

}  // namespace lk

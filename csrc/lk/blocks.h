// Formats whose rows are sequences of blocks: types of GGUF, as ggml defines them.
//
// The K-quants have blocks of 256 codes of 2 to 6 bits, one scale for each group of 16 or 32 of
// them in 4 to 8 bits, and what all of these are multiplied by in fp16. Q2_K, Q4_K and Q5_K also
// have a minimum for each group, which is subtracted from its weights. Types of 4 or 5 bits with
// blocks of 32 weights have a factor of their own for each block. IQ4_NL and IQ4_XS look their
// weights up in a table of 16 integers, t.
//
//   type    weights bytes  weight                          groups
//   Q2_K    256     84     d * scale * code - dmin * min   of 16, scale and minimum in 4 bits
//   Q3_K    256     110    d * (scale - 32) * (code - 4)   of 16, scale in 6 bits
//   Q4_K    256     144    d * scale * code - dmin * min   of 32, scale and minimum in 6 bits
//   Q5_K    256     176    d * scale * code - dmin * min   of 32, scale and minimum in 6 bits
//   Q6_K    256     210    d * scale * (code - 32)         of 16, scale in 8 bits, signed
//   Q4_1    32      20     d * code + m
//   Q5_0    32      22     d * (code - 16)
//   Q5_1    32      24     d * code + m
//   IQ4_NL  32      18     d * t[code]
//   IQ4_XS  256     136    d * (scale - 32) * t[code]      of 32, scale in 6 bits
//
// IQ1, IQ2 and IQ3 have tables of entries of 8 weights (IQ3: of 4). Those of IQ2 and IQ3 are
// magnitudes, and each weight also has a sign: seven bits stand for eight signs (XXS and XS), or
// there is a bit for each (S). Below, e is a number of an entry, with its sign.
//
//   IQ1_S   256     50     d * (2 scale + 1) * (e +- 1/8)  of 32, scale in 3 bits
//   IQ1_M   256     56     d * (2 scale + 1) * (e +- 1/8)  of 16, scale in 3 bits
//   IQ2_XXS 256     66     d / 8 * (2 scale + 1) * e       of 32, scale in 4 bits
//   IQ2_XS  256     74     d / 8 * (2 scale + 1) * e       of 16, scale in 4 bits
//   IQ2_S   256     82     d / 8 * (2 scale + 1) * e       of 16, scale in 4 bits
//   IQ3_XXS 256     98     d / 4 * (2 scale + 1) * e       of 32, scale in 4 bits
//   IQ3_S   256     110    d * (2 scale + 1) * e           of 32, scale in 4 bits
//
// In a file the codes of a byte belong to different groups. The kernels want those of one group
// side by side, so a tile is reordered in place, without loss: first all codes, in units of 16
// weights (32 if types with tables of entries have groups of 32), then what the scales are made
// from, in words of four bytes, then in halves of two bytes. All three are transposed as other
// weights are (tiles.h): the first word of all rows, then the next one. The number of bytes stays
// the same.
//
// Units of entries are parts of the file's block (blocks.cpp), and so are their high bits and signs
// where they are among the words. A unit of codes holds up to three planes of bits, in words and
// then a half. Its weights are multiplied in four steps of four bytes. Byte b of step t is weight
// code_place(b, t):
//   4 bits: two words. Step t is the low nibbles (t even) or the high ones of word t / 2.
//   2 bits: a word. Step t is bits 2t and 2t + 1 of each byte.
//   1 bit: a half. Step t of byte b is bit 4b + t.
#pragma once

#include <cstdint>

#include "lk/kernels.h"
#include "lk/tiles.h"

namespace lk {

constexpr int64_t kBlockWeights = 256;  // of most formats
constexpr int64_t kCodeUnit = 16;       // weights

constexpr int64_t code_place(int64_t byte, int64_t step) {
  return step / 2 * 8 + 2 * byte + step % 2;
}

struct BlockLayout {
  int64_t weights;      // of a block
  int64_t group;        // weights with one scale
  int64_t block_bytes;  // in the file
  int64_t units;        // of a block
  int64_t unit_bytes;   // words of four bytes, and two more if it has a half
  int64_t word_bytes;   // of the block, for scales and minimums in words
  int64_t half_bytes;   // and in halves
  // Turns a block of the file into its units, its words and its halves, in as many bytes; and back.
  void (*split)(const uint8_t* block, uint8_t* parts);
  void (*join)(const uint8_t* parts, uint8_t* block);

  int64_t code_bytes() const { return units * unit_bytes; }
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

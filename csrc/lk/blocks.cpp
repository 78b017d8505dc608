#include "lk/blocks.h"

#include <cstring>

namespace lk {
namespace {

// The low bits of codes, four or two of each: a chunk of 32 bytes has those of 64 or 128 weights.
// The lowest bits of all its bytes come first.
template <int kBits>
void split_low(const uint8_t* from, uint8_t* codes) {
  constexpr int kInByte = 8 / kBits;
  for (int64_t chunk = 0; chunk < kBlockWeights / (32 * kInByte); ++chunk) {
    for (int part = 0; part < kInByte; ++part) {
      for (int64_t i = 0; i < 32; ++i) {
        codes[(chunk * kInByte + part) * 32 + i] =
            static_cast<uint8_t>(from[chunk * 32 + i] >> part * kBits & ((1 << kBits) - 1));
      }
    }
  }
}
template <int kBits>
void join_low(const uint8_t* codes, uint8_t* to) {
  constexpr int kInByte = 8 / kBits;
  for (int64_t chunk = 0; chunk < kBlockWeights / (32 * kInByte); ++chunk) {
    for (int64_t i = 0; i < 32; ++i) {
      int byte = 0;
      for (int part = 0; part < kInByte; ++part) {
        const int code = codes[(chunk * kInByte + part) * 32 + i] & ((1 << kBits) - 1);
        byte |= code << part * kBits;
      }
      to[chunk * 32 + i] = static_cast<uint8_t>(byte);
    }
  }
}

// The high bit of codes: bit n of byte i belongs to weight 32 n + i.
void split_bit(const uint8_t* from, int place, uint8_t* codes) {
  for (int64_t n = 0; n < 8; ++n) {
    for (int64_t i = 0; i < 32; ++i) {
      codes[n * 32 + i] |= static_cast<uint8_t>((from[i] >> n & 1) << place);
    }
  }
}
void join_bit(const uint8_t* codes, int place, uint8_t* to) {
  for (int64_t i = 0; i < 32; ++i) {
    int byte = 0;
    for (int64_t n = 0; n < 8; ++n) byte |= (codes[n * 32 + i] >> place & 1) << n;
    to[i] = static_cast<uint8_t>(byte);
  }
}

// Q2_K: 16 bytes of scales and minimums, 64 of codes, d and dmin.
void split_q2k(const uint8_t* block, uint8_t* codes, uint8_t* rest) {
  split_low<2>(block + 16, codes);
  std::memcpy(rest, block, 16);
  std::memcpy(rest + 16, block + 80, 4);
}
void join_q2k(const uint8_t* codes, const uint8_t* rest, uint8_t* block) {
  join_low<2>(codes, block + 16);
  std::memcpy(block, rest, 16);
  std::memcpy(block + 80, rest + 16, 4);
}

// Q3_K: 32 bytes of high bits, 64 of low ones, 12 of scales, d.
void split_q3k(const uint8_t* block, uint8_t* codes, uint8_t* rest) {
  split_low<2>(block + 32, codes);
  split_bit(block, 2, codes);
  std::memcpy(rest, block + 96, 14);
}
void join_q3k(const uint8_t* codes, const uint8_t* rest, uint8_t* block) {
  join_low<2>(codes, block + 32);
  join_bit(codes, 2, block);
  std::memcpy(block + 96, rest, 14);
}

// Q4_K: d and dmin, 12 bytes of scales and minimums, 128 of codes.
void split_q4k(const uint8_t* block, uint8_t* codes, uint8_t* rest) {
  split_low<4>(block + 16, codes);
  std::memcpy(rest, block, 16);
}
void join_q4k(const uint8_t* codes, const uint8_t* rest, uint8_t* block) {
  join_low<4>(codes, block + 16);
  std::memcpy(block, rest, 16);
}

// Q5_K: d and dmin, 12 bytes of scales and minimums, 32 of high bits, 128 of low ones.
void split_q5k(const uint8_t* block, uint8_t* codes, uint8_t* rest) {
  split_low<4>(block + 48, codes);
  split_bit(block + 16, 4, codes);
  std::memcpy(rest, block, 16);
}
void join_q5k(const uint8_t* codes, const uint8_t* rest, uint8_t* block) {
  join_low<4>(codes, block + 48);
  join_bit(codes, 4, block + 16);
  std::memcpy(block, rest, 16);
}

// Q6_K: 128 bytes of low bits, 64 of high ones, 16 of scales, d. Each half of the block has its low
// bits in chunks of 64 bytes.
void split_q6k(const uint8_t* block, uint8_t* codes, uint8_t* rest) {
  for (int64_t half = 0; half < 2; ++half) {
    const uint8_t* low = block + half * 64;
    const uint8_t* high = block + 128 + half * 32;
    uint8_t* to = codes + half * 128;
    for (int64_t part = 0; part < 4; ++part) {
      for (int64_t i = 0; i < 32; ++i) {
        const int nibble = low[part % 2 * 32 + i] >> part / 2 * 4 & 15;
        to[part * 32 + i] = static_cast<uint8_t>(nibble | (high[i] >> part * 2 & 3) << 4);
      }
    }
  }
  std::memcpy(rest, block + 192, 18);
}
void join_q6k(const uint8_t* codes, const uint8_t* rest, uint8_t* block) {
  for (int64_t half = 0; half < 2; ++half) {
    uint8_t* low = block + half * 64;
    uint8_t* high = block + 128 + half * 32;
    const uint8_t* from = codes + half * 128;
    for (int64_t i = 0; i < 32; ++i) {
      int bits = 0;
      for (int64_t part = 0; part < 4; ++part) bits |= (from[part * 32 + i] >> 4) << part * 2;
      high[i] = static_cast<uint8_t>(bits);
    }
    for (int64_t i = 0; i < 64; ++i) {
      low[i] = static_cast<uint8_t>((from[i] & 15) | (from[64 + i] & 15) << 4);
    }
  }
  std::memcpy(block + 192, rest, 18);
}

constexpr BlockLayout kQ2K{2, 16, 84, 20, 0, split_q2k, join_q2k};
constexpr BlockLayout kQ3K{3, 16, 110, 12, 2, split_q3k, join_q3k};
constexpr BlockLayout kQ4K{4, 32, 144, 16, 0, split_q4k, join_q4k};
constexpr BlockLayout kQ5K{5, 32, 176, 16, 0, split_q5k, join_q5k};
constexpr BlockLayout kQ6K{6, 16, 210, 16, 2, split_q6k, join_q6k};

// A plane of a unit: `bits` of each code, those from `first` on.
struct Plane {
  int bits = 0;
  int first = 0;
  int bytes() const { return kCodeUnit * bits / 8; }
  // The bit of the plane where the code of byte `b` of step `t` begins.
  int64_t place(int64_t b, int64_t t) const {
    if (bits == 4) return t / 2 * 32 + 8 * b + t % 2 * 4;
    return bits == 2 ? 8 * b + 2 * t : 4 * b + t;
  }
};

// The planes of codes of so many bits; the second one may have none.
struct Planes {
  Plane planes[2];
  explicit Planes(int bits) {
    planes[0] = {bits >= 4 ? 4 : 2, 0};
    planes[1] = {bits - planes[0].bits, planes[0].bits};
  }
};

// Packs a plane of 16 codes into up to 8 bytes, and unpacks it.
uint64_t pack_plane(const Plane& plane, const uint8_t* codes) {
  uint64_t packed = 0;
  for (int64_t t = 0; t < 4; ++t) {
    for (int64_t b = 0; b < 4; ++b) {
      const uint64_t code = codes[code_place(b, t)] >> plane.first & ((1 << plane.bits) - 1);
      packed |= code << plane.place(b, t);
    }
  }
  return packed;
}
void unpack_plane(const Plane& plane, uint64_t packed, uint8_t* codes) {
  for (int64_t t = 0; t < 4; ++t) {
    for (int64_t b = 0; b < 4; ++b) {
      const uint64_t code = packed >> plane.place(b, t) & ((1 << plane.bits) - 1);
      codes[code_place(b, t)] |= static_cast<uint8_t>(code << plane.first);
    }
  }
}

// Calls each(place, bytes, at) for the words and halves of a plane of unit `unit` in row `row`:
// `place` is in the tile, and `at` in the packed plane.
template <class Each>
void for_each_word(const Plane& plane, char* unit_plane, int64_t rows, int64_t row, Each&& each) {
  const int64_t word = plane.bytes() < kUnitBytes ? plane.bytes() : kUnitBytes;
  for (int64_t at = 0; at < plane.bytes(); at += word) {
    each(unit_plane + at * rows + row * word, word, at);
  }
}

// Calls each(place, bytes, at) for what follows the codes of a block in row `row`: `place` is in
// the tile, and `at` counts bytes from the first word on.
template <class Each>
void for_each_rest(const BlockLayout& layout, char* tile, int64_t rows, int64_t row, int64_t block,
                   int64_t blocks, Each&& each) {
  char* words = tile + blocks * layout.code_bytes() * rows;
  char* halves = words + blocks * layout.word_bytes * rows;
  for (int64_t at = 0; at < layout.word_bytes; at += kUnitBytes) {
    each(words + (block * layout.word_bytes + at) * rows + row * kUnitBytes, kUnitBytes, at);
  }
  for (int64_t at = 0; at < layout.half_bytes; at += 2) {
    each(halves + (block * layout.half_bytes + at) * rows + row * 2, int64_t{2},
         layout.word_bytes + at);
  }
}

constexpr int64_t kMostRestBytes = 32;

// Calls each(plane, its place in the tile, the codes of its unit) for all planes of a block.
template <class Each>
void for_each_plane(const BlockLayout& layout, char* tile, int64_t rows, int64_t block,
                    uint8_t* codes, Each&& each) {
  const Planes planes(layout.bits);
  for (int64_t unit = 0; unit < kBlockWeights / kCodeUnit; ++unit) {
    char* place = tile + (block * layout.code_bytes() + unit * layout.unit_bytes()) * rows;
    for (const Plane& plane : planes.planes) {
      if (plane.bits == 0) continue;
      each(plane, place, codes + unit * kCodeUnit);
      place += plane.bytes() * rows;
    }
  }
}

}  // namespace

const BlockLayout* block_layout(Format format) {
  switch (format) {
    case Format::kQ2K:
    case Format::kQ2KAct8:
      return &kQ2K;
    case Format::kQ3K:
    case Format::kQ3KAct8:
      return &kQ3K;
    case Format::kQ4K:
    case Format::kQ4KAct8:
      return &kQ4K;
    case Format::kQ5K:
    case Format::kQ5KAct8:
      return &kQ5K;
    case Format::kQ6K:
    case Format::kQ6KAct8:
      return &kQ6K;
    default:
      return nullptr;
  }
}

void order_blocks(const BlockLayout& layout, char* tile, int64_t rows, int64_t row_bytes,
                  char* buffer) {
  std::memcpy(buffer, tile, rows * row_bytes);
  const int64_t blocks = layout.blocks(row_bytes);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      uint8_t codes[kBlockWeights], rest[kMostRestBytes];
      layout.split(
          reinterpret_cast<const uint8_t*>(buffer) + row * row_bytes + block * layout.block_bytes,
          codes, rest);
      for_each_plane(layout, tile, rows, block, codes,
                     [&](const Plane& plane, char* place, const uint8_t* of_unit) {
                       const uint64_t packed = pack_plane(plane, of_unit);
                       for_each_word(plane, place, rows, row,
                                     [&](char* to, int64_t bytes, int64_t at) {
                                       const uint64_t word = packed >> 8 * at;
                                       std::memcpy(to, &word, bytes);
                                     });
                     });
      for_each_rest(
          layout, tile, rows, row, block, blocks,
          [&](char* to, int64_t bytes, int64_t at) { std::memcpy(to, rest + at, bytes); });
    }
  }
}

void restore_blocks(const BlockLayout& layout, char* tile, int64_t rows, int64_t row_bytes,
                    char* buffer) {
  std::memcpy(buffer, tile, rows * row_bytes);
  const int64_t blocks = layout.blocks(row_bytes);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      uint8_t codes[kBlockWeights] = {}, rest[kMostRestBytes];
      for_each_plane(layout, buffer, rows, block, codes,
                     [&](const Plane& plane, char* place, uint8_t* of_unit) {
                       uint64_t packed = 0;
                       for_each_word(plane, place, rows, row,
                                     [&](const char* from, int64_t bytes, int64_t at) {
                                       uint64_t word = 0;
                                       std::memcpy(&word, from, bytes);
                                       packed |= word << 8 * at;
                                     });
                       unpack_plane(plane, packed, of_unit);
                     });
      for_each_rest(layout, buffer, rows, row, block, blocks,
                    [&](const char* from, int64_t bytes, int64_t at) {
                      std::memcpy(rest + at, from, bytes);
                    });
      layout.join(codes, rest,
                  reinterpret_cast<uint8_t*>(tile) + row * row_bytes + block * layout.block_bytes);
    }
  }
}

}  // namespace lk

#include "lk/blocks.h"

#include <cstring>
#include <initializer_list>

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

// Blocks of 32 weights: their factors, 32 bits if codes have a fifth one, and the low bits of the
// first 16 codes beside those of the others.
template <int kFactorBytes, bool kFifth>
void split_small(const uint8_t* block, uint8_t* codes, uint8_t* rest) {
  const uint8_t* low = block + kFactorBytes + (kFifth ? 4 : 0);
  for (int64_t i = 0; i < 16; ++i) {
    codes[i] = low[i] & 15;
    codes[16 + i] = low[i] >> 4;
  }
  for (int64_t i = 0; kFifth && i < 32; ++i) {
    codes[i] |= static_cast<uint8_t>((block[kFactorBytes + i / 8] >> i % 8 & 1) << 4);
  }
  std::memcpy(rest, block, kFactorBytes);
}
template <int kFactorBytes, bool kFifth>
void join_small(const uint8_t* codes, const uint8_t* rest, uint8_t* block) {
  std::memcpy(block, rest, kFactorBytes);
  uint8_t* low = block + kFactorBytes + (kFifth ? 4 : 0);
  for (int64_t i = 0; i < 16; ++i) {
    low[i] = static_cast<uint8_t>((codes[i] & 15) | (codes[16 + i] & 15) << 4);
  }
  for (int64_t i = 0; kFifth && i < 4; ++i) {
    int byte = 0;
    for (int64_t bit = 0; bit < 8; ++bit) byte |= (codes[8 * i + bit] >> 4) << bit;
    block[kFactorBytes + i] = static_cast<uint8_t>(byte);
  }
}

// IQ4_XS: d, high bits of scales, low ones, and the codes of each group as in a block of 32.
void split_iq4xs(const uint8_t* block, uint8_t* codes, uint8_t* rest) {
  for (int64_t i = 0; i < 8; ++i) split_small<0, false>(block + 8 + 16 * i, codes + 32 * i, rest);
  std::memcpy(rest, block, 8);
}
void join_iq4xs(const uint8_t* codes, const uint8_t* rest, uint8_t* block) {
  for (int64_t i = 0; i < 8; ++i) join_small<0, false>(codes + 32 * i, rest, block + 8 + 16 * i);
  std::memcpy(block, rest, 8);
}

// A plane of a unit: `bits` of each code, those from `first` on.
struct Plane {
  int bits = 0;
  int first = 0;
  int64_t bytes() const { return kCodeUnit * bits / 8; }
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

// BlockLayout::split and join, by what turns a block into codes, a byte each, and the rest, and
// back.
template <int kBits, int64_t kWeights, auto kSplit>
void split_codes(const uint8_t* block, uint8_t* parts) {
  uint8_t codes[kWeights];
  kSplit(block, codes, parts + kWeights * kBits / 8);
  for (const uint8_t* unit = codes; unit != codes + kWeights; unit += kCodeUnit) {
    for (const Plane& plane : Planes(kBits).planes) {
      const uint64_t packed = pack_plane(plane, unit);
      std::memcpy(parts, &packed, plane.bytes());
      parts += plane.bytes();
    }
  }
}
template <int kBits, int64_t kWeights, auto kJoin>
void join_codes(const uint8_t* parts, uint8_t* block) {
  uint8_t codes[kWeights] = {};
  const uint8_t* const rest = parts + kWeights * kBits / 8;
  for (uint8_t* unit = codes; unit != codes + kWeights; unit += kCodeUnit) {
    for (const Plane& plane : Planes(kBits).planes) {
      uint64_t packed = 0;
      std::memcpy(&packed, parts, plane.bytes());
      unpack_plane(plane, packed, unit);
      parts += plane.bytes();
    }
  }
  kJoin(codes, rest, block);
}
template <int kBits, int64_t kWeights, auto kSplit, auto kJoin>
constexpr BlockLayout of_codes(int64_t group, int64_t word_bytes, int64_t half_bytes) {
  return {kWeights,
          group,
          kWeights * kBits / 8 + word_bytes + half_bytes,
          kWeights / kCodeUnit,
          kCodeUnit * kBits / 8,
          word_bytes,
          half_bytes,
          split_codes<kBits, kWeights, kSplit>,
          join_codes<kBits, kWeights, kJoin>};
}

constexpr BlockLayout kQ2K = of_codes<2, 256, split_q2k, join_q2k>(16, 20, 0);
constexpr BlockLayout kQ3K = of_codes<3, 256, split_q3k, join_q3k>(16, 12, 2);
constexpr BlockLayout kQ4K = of_codes<4, 256, split_q4k, join_q4k>(32, 16, 0);
constexpr BlockLayout kQ5K = of_codes<5, 256, split_q5k, join_q5k>(32, 16, 0);
constexpr BlockLayout kQ6K = of_codes<6, 256, split_q6k, join_q6k>(16, 16, 2);
constexpr BlockLayout kQ41 = of_codes<4, 32, split_small<4, false>, join_small<4, false>>(32, 4, 0);
constexpr BlockLayout kQ50 = of_codes<5, 32, split_small<2, true>, join_small<2, true>>(32, 0, 2);
constexpr BlockLayout kQ51 = of_codes<5, 32, split_small<4, true>, join_small<4, true>>(32, 4, 0);
constexpr BlockLayout kIq4Nl =
    of_codes<4, 32, split_small<2, false>, join_small<2, false>>(32, 0, 2);
constexpr BlockLayout kIq4Xs = of_codes<4, 256, split_iq4xs, join_iq4xs>(32, 8, 0);

// Parts of a block, `step` bytes apart: the first one has `bytes` from `first` on.
struct Run {
  int64_t first;
  int64_t bytes;
  int64_t step = 0;
  int64_t times = 1;
};

// Where each byte comes from that BlockLayout::split makes of a block without changing it: each
// unit has a part of each of its runs, and then come whole runs of the block.
template <int64_t kBytes>
struct ByteOrder {
  uint8_t from[kBytes] = {};
  constexpr ByteOrder(int64_t units, std::initializer_list<Run> of_units,
                      std::initializer_list<Run> of_block) {
    int64_t at = 0;
    const auto take = [&](const Run& run, int64_t i) {
      for (int64_t b = 0; b < run.bytes; ++b) {
        from[at++] = static_cast<uint8_t>(run.first + i * run.step + b);
      }
    };
    for (int64_t unit = 0; unit < units; ++unit) {
      for (const Run& run : of_units) take(run, unit);
    }
    for (const Run& run : of_block) {
      for (int64_t i = 0; i < run.times; ++i) take(run, i);
    }
  }
};
template <auto kOrder>
void split_bytes(const uint8_t* block, uint8_t* parts) {
  for (const uint8_t from : kOrder.from) *parts++ = block[from];
}
template <auto kOrder>
void join_bytes(const uint8_t* parts, uint8_t* block) {
  for (const uint8_t from : kOrder.from) block[from] = *parts++;
}
template <auto kOrder>
constexpr BlockLayout of_bytes(int64_t group, int64_t units, int64_t word_bytes,
                               int64_t half_bytes) {
  constexpr int64_t kBytes = sizeof(kOrder.from);
  return {kBlockWeights,
          group,
          kBytes,
          units,
          (kBytes - word_bytes - half_bytes) / units,
          word_bytes,
          half_bytes,
          split_bytes<kOrder>,
          join_bytes<kOrder>};
}

// d, 32 bytes of entries, 16 of high bits with scales.
constexpr BlockLayout kIq1S =
    of_bytes<ByteOrder<50>(8, {{2, 4, 4}}, {{34, 16}, {0, 2}})>(32, 8, 16, 2);
// 32 bytes of entries, 16 of high bits, 8 of scales with d.
constexpr BlockLayout kIq1M =
    of_bytes<ByteOrder<56>(16, {{0, 2, 2}}, {{32, 16}, {48, 8}})>(16, 16, 24, 0);
// d, then for each group 4 bytes of entries, and 4 of signs with a scale.
constexpr BlockLayout kIq2Xxs =
    of_bytes<ByteOrder<66>(8, {{2, 4, 8}}, {{6, 4, 8, 8}, {0, 2}})>(32, 8, 32, 2);
// d, 64 bytes of entries with signs, 8 of scales.
constexpr BlockLayout kIq2Xs =
    of_bytes<ByteOrder<74>(16, {{2, 4, 4}}, {{66, 8}, {0, 2}})>(16, 16, 8, 2);
// d, 32 bytes of entries, 32 of signs, 8 of high bits, 8 of scales.
constexpr BlockLayout kIq2S =
    of_bytes<ByteOrder<82>(16, {{2, 2, 2}, {34, 2, 2}}, {{66, 16}, {0, 2}})>(16, 16, 16, 2);
// d, 64 bytes of entries, 32 of signs with scales.
constexpr BlockLayout kIq3Xxs =
    of_bytes<ByteOrder<98>(8, {{2, 8, 8}}, {{66, 32}, {0, 2}})>(32, 8, 32, 2);
// d, 64 bytes of entries, 8 of high bits, 32 of signs, 4 of scales.
constexpr BlockLayout kIq3S =
    of_bytes<ByteOrder<110>(8, {{2, 8, 8}, {74, 4, 4}}, {{66, 8}, {106, 4}, {0, 2}})>(32, 8, 12, 2);

constexpr int64_t kMostBlockBytes = 210;

// Calls each(place, bytes, at) for the words and halves of a block in row `row`: `place` is in the
// tile, and `at` in what BlockLayout::split makes of the block.
template <class Each>
void for_each_part(const BlockLayout& layout, char* tile, int64_t rows, int64_t row, int64_t block,
                   int64_t blocks, Each&& each) {
  char* place = tile + block * layout.code_bytes() * rows;
  int64_t at = 0;
  const auto parts = [&](int64_t bytes, int64_t of) {
    for (int64_t end = at + bytes; at < end; at += of, place += of * rows) {
      each(place + row * of, of, at);
    }
  };
  for (int64_t unit = 0; unit < layout.units; ++unit) {
    parts(layout.unit_bytes / kUnitBytes * kUnitBytes, kUnitBytes);
    parts(layout.unit_bytes % kUnitBytes, 2);
  }
  char* const words = tile + blocks * layout.code_bytes() * rows;
  place = words + block * layout.word_bytes * rows;
  parts(layout.word_bytes, kUnitBytes);
  place = words + (blocks * layout.word_bytes + block * layout.half_bytes) * rows;
  parts(layout.half_bytes, 2);
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
    case Format::kQ41:
    case Format::kQ41Act8:
      return &kQ41;
    case Format::kQ50:
    case Format::kQ50Act8:
      return &kQ50;
    case Format::kQ51:
    case Format::kQ51Act8:
      return &kQ51;
    case Format::kIq4Nl:
    case Format::kIq4NlAct8:
      return &kIq4Nl;
    case Format::kIq4Xs:
    case Format::kIq4XsAct8:
      return &kIq4Xs;
    case Format::kIq1S:
    case Format::kIq1SAct8:
      return &kIq1S;
    case Format::kIq1M:
    case Format::kIq1MAct8:
      return &kIq1M;
    case Format::kIq2Xxs:
    case Format::kIq2XxsAct8:
      return &kIq2Xxs;
    case Format::kIq2Xs:
    case Format::kIq2XsAct8:
      return &kIq2Xs;
    case Format::kIq2S:
    case Format::kIq2SAct8:
      return &kIq2S;
    case Format::kIq3Xxs:
    case Format::kIq3XxsAct8:
      return &kIq3Xxs;
    case Format::kIq3S:
    case Format::kIq3SAct8:
      return &kIq3S;
    default:
      return nullptr;
  }
}

void order_blocks(const BlockLayout& layout, char* tile, int64_t rows, int64_t row_bytes,
                  char* buffer) {
  std::memcpy(buffer, tile, rows * row_bytes);
  const int64_t blocks = layout.blocks(row_bytes);
  const auto* from = reinterpret_cast<const uint8_t*>(buffer);
  uint8_t parts[kMostBlockBytes];
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t block = 0; block < blocks; ++block, from += layout.block_bytes) {
      layout.split(from, parts);
      for_each_part(
          layout, tile, rows, row, block, blocks,
          [&](char* to, int64_t bytes, int64_t at) { std::memcpy(to, parts + at, bytes); });
    }
  }
}

void restore_blocks(const BlockLayout& layout, char* tile, int64_t rows, int64_t row_bytes,
                    char* buffer) {
  std::memcpy(buffer, tile, rows * row_bytes);
  const int64_t blocks = layout.blocks(row_bytes);
  auto* to = reinterpret_cast<uint8_t*>(tile);
  uint8_t parts[kMostBlockBytes];
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t block = 0; block < blocks; ++block, to += layout.block_bytes) {
      for_each_part(layout, buffer, rows, row, block, blocks,
                    [&](const char* from, int64_t bytes, int64_t at) {
                      std::memcpy(parts + at, from, bytes);
                    });
      layout.join(parts, to);
    }
  }
}

}  // namespace lk

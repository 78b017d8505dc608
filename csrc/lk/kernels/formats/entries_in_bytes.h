// Entries of IQ2_XS and IQ2_S on AVX-512 with VBMI, by numbers of levels (codebooks.h), a byte at a
// time.
//
// A permutation of bytes looks 64 of them up among 128. Where a unit has two entries, that is those
// of two vectors of rows, so these are unpacked together: what takes longest then is to load the
// table, of 1 to 2 KiB. On Zen 4, IQ2_S takes 0.86 to 0.95 of the time of loading its entries one
// by one.
#pragma once

#include "lk/kernels/formats/entries_in_levels.h"

#if defined(__AVX512VBMI__)

namespace lk::LK_ISA {

// In each byte: b where the byte of `bits` has a bit of `which`, else a.
inline U32x16 select_bytes(U32x16 bits, uint8_t which, U32x16 a, U32x16 b) {
  typedef uint8_t ByteVector __attribute__((vector_size(64)));
  const auto set = ((ByteVector)bits.v[0] & (ByteVector{} + which)) != 0;
  return {(UintVector)(set ? (ByteVector)b.v[0] : (ByteVector)a.v[0])};
}

// The bytes of a table of kEntries that each byte is the number of, with the low bits of its byte
// of `high` above its own.
template <int kEntries>
inline U32x16 bytes_of(const uint8_t* table, U32x16 index, U32x16 high) {
  if constexpr (kEntries == 128) {
    return {(UintVector)_mm512_permutex2var_epi8(_mm512_load_si512(table), (__m512i)index.v[0],
                                                 _mm512_load_si512(table + 64))};
  } else {
    constexpr int kHalf = kEntries / 2;
    const U32x16 bits = kEntries == 256 ? index : high;
    return select_bytes(bits, kEntries == 256 ? 128 : kHalf / 256,
                        bytes_of<kHalf>(table, index, high),
                        bytes_of<kHalf>(table + kHalf, index, high));
  }
}

// Four numbers of two bits, out of byte `byte` of each lane: the lowest bits of the lane's bytes.
inline U32x16 spread_pairs(U32x16 a, int byte) {
  // Where the eight bits of each byte begin, in a lane and in the lane after it.
  const uint64_t from = (0x06040200u + 0x08080808u * static_cast<uint64_t>(byte)) * 0x100000001u +
                        0x2020202000000000u;
  typedef uint64_t QuadVector __attribute__((vector_size(64)));
  const auto begin = (__m512i)(QuadVector{} + from);
  return {(UintVector)_mm512_multishift_epi64_epi8(begin, (__m512i)a.v[0])};
}

// The numbers of the levels of 64 entries of eight weights, which are in the bytes of lanes.
template <int kEntries>
struct Numbers {
  U32x16 of_step[2];

  // `index` has the low eight bits of the numbers of the entries, `high` those above them.
  Numbers(const uint8_t* table, U32x16 index, U32x16 high)
      : of_step{bytes_of<kEntries>(table, index, high),
                bytes_of<kEntries>(table + kEntries, index, high)} {}

  // Those of step i of the entry in byte `byte` of each lane.
  U32x16 of(int i, int byte) const { return spread_pairs(of_step[i], byte) & 0x03030303; }
};

// Types with units of two entries. Type::Both is made from the words of two vectors of rows, and
// its step(vector, k, i) is step i of entry k of one of them.
template <class Type, int kShared>
struct EntriesInBytes : PairedEntries<1, kShared, 16> {
  static __attribute__((noinline)) void steps_of_two(const U32x16* words, const U32x16* words2,
                                                     U32x16* step, U32x16* step2) {
    const typename Type::Both both(words, words2);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) (i < 4 ? step : step2)[i % 4] = both.step(i / 4, i / 2 % 2, i % 2);
  }
  static void steps(const U32x16* words, U32x16* step) {
    U32x16 same[4];
    steps_of_two(words, words, step, same);
  }
};

struct Iq2SEntries : EntriesInBytes<Iq2SEntries, 4> {
  static constexpr int kOffset = 64;
  struct Both {
    U32x16 signs;
    Numbers<1024> numbers;

    Both(const U32x16* words, const U32x16* words2)
        : signs(words[0] >> 16 | (words2[0] & 0xffff0000)),
          numbers(codebooks::kIq2SInLevelBytes, (words[0] & 0xffff) | words2[0] << 16,
                  high((words[1] & 0xf) | (words2[1] & 0xf) << 16)) {}
    // Two bits above those of the first entry are those of the second.
    static U32x16 high(U32x16 both) { return both | both << 6; }

    U32x16 step(int vector, int k, int i) const {
      const int byte = 2 * vector + k;
      return signed_levels<kOffset>(codebooks::kIq2SLevelsPlus64, numbers.of(i, byte), signs, byte,
                                    i);
    }
  };
};

struct Iq2XsEntries : EntriesInBytes<Iq2XsEntries, 0> {
  static constexpr int kOffset = 64;
  struct Both {
    U32x16 high;  // a bit of the entry, and seven of signs
    U32x16 signs;
    Numbers<512> numbers;

    Both(const U32x16* words, const U32x16* words2)
        : high((words[0] >> 8 & 0x00ff00ff) | (words2[0] & 0xff00ff00)),
          signs(with_parity(high >> 1 & 0x7f7f7f7f)),
          numbers(codebooks::kIq2XsInLevelBytes,
                  (words[0] & 0x00ff00ff) | (words2[0] << 8 & 0xff00ff00), high) {}

    U32x16 step(int vector, int k, int i) const {
      const int byte = vector + 2 * k;
      return signed_levels<kOffset>(codebooks::kIq2XsLevelsPlus64, numbers.of(i, byte), signs, byte,
                                    i);
    }
  };
};

}  // namespace lk::LK_ISA

#endif

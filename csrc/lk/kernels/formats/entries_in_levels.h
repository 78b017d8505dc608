// Entries of IQ2 and IQ3 on AVX-512, by numbers of levels (codebooks.h).
//
// An entry has few different magnitudes, so that the numbers of all of them fit into 16 bits. A
// permutation of 16-bit lanes looks 32 entries up among 64. On Zen 4, one takes a cycle, and
// vpgatherdd, which loads 16 entries of 32 bits, takes over 20.
#pragma once

#include "lk/kernels/formats/entries.h"

#if defined(__AVX512F__)

namespace lk::LK_ISA {

typedef uint16_t HalfVector __attribute__((vector_size(64)));

// In each half of a lane: b where the half of `bits` has a bit of that of `which`, else a.
inline U32x16 select_halves(U32x16 bits, uint32_t which, U32x16 a, U32x16 b) {
  const auto set = ((HalfVector)bits.v[0] & (HalfVector)(UintVector{} + which)) != 0;
  return {(UintVector)(set ? (HalfVector)b.v[0] : (HalfVector)a.v[0])};
}

// The entries that the low bits of each half are numbers of, of a table of kEntries, 64 or more.
template <int kEntries>
inline U32x16 entries_of(const uint16_t* table, U32x16 index) {
  if constexpr (kEntries == 64) {
    return {(UintVector)_mm512_permutex2var_epi16(_mm512_load_si512(table), (__m512i)index.v[0],
                                                  _mm512_load_si512(table + 32))};
  } else {
    constexpr int kHalf = kEntries / 2;
    return select_halves(index, kHalf * 0x00010001u, entries_of<kHalf>(table, index),
                         entries_of<kHalf>(table + kHalf, index));
  }
}

// The eight magnitudes of the entry in half h of each lane, with the signs of byte `byte`, in two
// steps.
template <int kOffset>
inline void signed_levels_of_eight(const uint8_t* levels, U32x16 entries, int h, U32x16 signs,
                                   int byte, U32x16* step) {
  // Two bytes twice, so that a shift of each half brings four numbers to their bytes.
  const U32x16 twice = shuffle_lanes(entries, 0x01000100u + h * 0x02020202u);
  for (int i = 0; i < 2; ++i) {
    const auto shift = (HalfVector)(UintVector{} + (i == 0 ? 0x00020000u : 0x00060004u));
    const U32x16 numbers{(UintVector)((HalfVector)twice.v[0] >> shift) & 0x03030303};
    step[i] = with_signs<kOffset>(lookup_bytes(levels, numbers), signs, 2 * byte + i);
  }
}

// The magnitudes of these numbers with the signs of byte `byte` of each lane: its even bits in step
// 0, and its odd ones in step 1 (PairedEntries).
template <int kOffset>
inline U32x16 signed_levels(const uint8_t* levels, U32x16 numbers, U32x16 signs, int byte, int i) {
  return subtract_bytes_from(2 * kOffset, lookup_bytes(levels, numbers), signs, byte,
                             0x40100401u << i);
}

// The magnitudes of two entries of four, which both halves of a lane have, with the signs of byte
// `byte`, in two steps.
template <int kOffset>
inline void signed_levels_of_four(const uint8_t* levels, U32x16 entries, U32x16 signs, int byte,
                                  U32x16* step) {
  for (int i = 0; i < 2; ++i) {
    step[i] = signed_levels<kOffset>(levels, entries >> 4 * i & 0x0f0f0f0f, signs, byte, i);
  }
}
template <int kUnitWords, int kShared, int kWeights = 32>
struct PairedEntries : Entries<kWeights, kUnitWords, kShared> {
  static constexpr uint8_t kByteOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
};

// The types are described where their entries are loaded (entries.h).

struct Iq2XxsEntries : Entries<32, 1, 32> {
  static constexpr int kOffset = 64;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    const U32x16 signs = eight_signs(words[1]);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k += 2) {
      const U32x16 entries = entries_of<256>(codebooks::kIq2XxsInLevels, two_bytes(words[0], k));
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        signed_levels_of_eight<kOffset>(codebooks::kIq2XxsLevelsPlus64, entries, h, signs, k + h,
                                        step + 2 * (k + h));
      }
    }
  }
};

#if !defined(__AVX512VBMI__)  // entries_in_bytes.h
struct Iq2XsEntries : Entries<16, 1, 0> {
  static constexpr int kOffset = 64;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    const U32x16 signs = with_parity(words[0] >> 9 & 0x007f007f);
    const U32x16 entries = entries_of<512>(codebooks::kIq2XsInLevels, words[0]);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      signed_levels_of_eight<kOffset>(codebooks::kIq2XsLevelsPlus64, entries, h, signs, 2 * h,
                                      step + 2 * h);
    }
  }
};
#endif

struct Iq3XxsEntries : PairedEntries<2, 32> {
  static constexpr int kOffset = 64;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    const U32x16 signs = eight_signs(words[2]);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const U32x16 entries =
          entries_of<256>(codebooks::kIq3XxsInLevels, two_bytes(words[k / 2], k % 2 * 2));
      signed_levels_of_four<kOffset>(codebooks::kIq3XxsLevelsPlus64, entries, signs, k,
                                     step + 2 * k);
    }
  }
};

struct Iq3SEntries : PairedEntries<3, 8> {
  static constexpr int kOffset = 16;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    const auto* const table = codebooks::kIq3SInLevels;
    const U32x16 ninth_bits = shuffle_lanes(words[3], 0);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const U32x16 index = two_bytes(words[k / 2], k % 2 * 2);
      const U32x16 entries =
          select_halves(ninth_bits, 0x00020001u << 2 * k, entries_of<256>(table, index),
                        entries_of<256>(table + 256, index));
      signed_levels_of_four<kOffset>(codebooks::kIq3SLevelsPlus16, entries, words[2], k,
                                     step + 2 * k);
    }
  }
};

}  // namespace lk::LK_ISA

#endif

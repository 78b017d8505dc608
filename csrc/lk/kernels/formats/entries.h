// Codes of IQ1, IQ2 and IQ3, which are numbers of entries of tables (lookup.h), and how the entries
// of 16 rows are found: here they are loaded. The words of a unit are, in this order, its own and
// its bits of the block's words.
//
// Where the steps of a unit leave enough of AVX2's 16 registers, they are inlined, so that they
// need not be stored and loaded again: on Zen 4, IQ1_S, IQ1_M, IQ2_XS and IQ2_S take 0.74 to 0.85
// of the time then, and IQ3_S would take 1.5 times as long.
#pragma once

#include "lk/kernels/formats/codes.h"
#include "lk/kernels/formats/entry_loads.h"

namespace lk::LK_ISA {

// Adds the eighth bit to bytes of seven bits, such that the number of ones is even.
inline __attribute__((always_inline)) U32x16 with_parity(U32x16 bytes) {
  // The eighth bit for each four bits.
  alignas(16) static constexpr uint8_t kOdd[16] = {0,   128, 128, 0,   128, 0,   0,   128,
                                                   128, 0,   0,   128, 0,   128, 128, 0};
  return bytes | lookup_bytes(kOdd, (bytes ^ bytes >> 4) & 0x0f0f0f0f);
}
// Four signs of seven bits in the low 28 bits, as bytes.
inline __attribute__((always_inline)) U32x16 eight_signs(U32x16 sevens) {
  return with_parity((sevens & 0x7f) | (sevens << 1 & 0x7f00) | (sevens << 2 & 0x7f0000) |
                     (sevens << 3 & 0x7f000000));
}

// Gives four magnitudes, each plus kOffset, the signs of bits 4 n to 4 n + 3. The results are
// higher by kOffset, too.
template <int kOffset>
inline __attribute__((always_inline)) U32x16 with_signs(U32x16 magnitudes, U32x16 signs, int n) {
  return subtract_bytes_from(2 * kOffset, magnitudes, signs, n / 2, 0x08040201u << n % 2 * 4);
}

// What types of weights by entries have in common. Entries hold bytes in the order of K.
template <int kWeights, int kUnitWords, int kShared>
struct Entries {
  static constexpr int kUnitWeights = kWeights, kWords = kUnitWords, kSharedBits = kShared;
  static constexpr bool kHalf = false, kSlowUnpack = true;
  static constexpr uint8_t kByteOrder[8] = {0, 1, 2, 3, 4, 5, 6, 7};
};

// IQ1 has weights of -1, 0 and 1, and 1/8 is added to eight of them or subtracted. The tables have
// eight times the weights, plus the offset, so that 1 is what is added.
struct Iq1 {
  static constexpr int kOffset = 16;
  // No byte overflows.
  static U32x16 moved(U32x16 weights, U32x16 minus) {
    return weights + 0x01010101 - ((U32x16{} - minus) & 0x02020202);
  }
};

// The entries of IQ1 whose numbers are in the halves of each lane, in four steps. `minus` has a bit
// for each of the two.
inline __attribute__((always_inline)) void moved_entries(U32x16 numbers, const U32x16 (&minus)[2],
                                                         U32x16* step) {
  const NumbersInHalves in_halves(numbers);
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    U32x16 first, last;
    load_entries(codebooks::kIq1Times8Plus16, in_halves, h, &first, &last);
    step[2 * h] = Iq1::moved(first, minus[h]);
    step[2 * h + 1] = Iq1::moved(last, minus[h]);
  }
}

// Four bytes of entries; the block's words have three more bits of each entry, a scale, and whether
// 1/8 is subtracted.
struct Iq1SEntries : Entries<32, 1, 16>, Iq1 {
  static inline __attribute__((always_inline)) void steps(const U32x16* words, U32x16* step) {
    const U32x16 minus = words[1] >> 15 & 1;
#pragma GCC unroll 2
    for (int k = 0; k < 4; k += 2) {
      const U32x16 shared = words[1] >> 3 * k;
      const U32x16 high = (shared << 8 & 0x700) | (shared << 21 & 0x7000000);
      moved_entries(two_bytes(words[0], k) | high, {minus, minus}, step + 2 * k);
    }
  }
};

// Two bytes of entries; the block's words have for each three more bits, and whether 1/8 is
// subtracted.
struct Iq1MEntries : Entries<16, 0, 8>, Iq1 {
  static constexpr bool kHalf = true;
  static inline __attribute__((always_inline)) void steps(const U32x16* words, U32x16* step) {
    const U32x16 shared = words[1];
    const U32x16 high = (shared << 8 & 0x700) | (shared << 20 & 0x7000000);
    moved_entries(two_bytes(words[0], 0) | high, {shared >> 3 & 1, shared >> 7 & 1}, step);
  }
};

// AVX-512 finds entries in registers, of these types with VBMI (entries_in_bytes.h).
#if !defined(__AVX512VBMI__)

// Two entries of eight weights for each lane, with bytes `byte` and the next of the signs, in four
// steps.
template <int kOffset, class Numbers>
inline __attribute__((always_inline)) void signed_entries_of_eight(const uint32_t* table,
                                                                   const Numbers& numbers,
                                                                   U32x16 signs, int byte,
                                                                   U32x16* step) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    U32x16 first, last;
    load_entries(table, numbers, h, &first, &last);
    step[2 * h] = with_signs<kOffset>(first, signs, 2 * (byte + h));
    step[2 * h + 1] = with_signs<kOffset>(last, signs, 2 * (byte + h) + 1);
  }
}

// Two bytes of entries and two of signs; the block's words have two more bits of each entry.
struct Iq2SEntries : Entries<16, 1, 4> {
  static constexpr int kOffset = 64;
  static inline __attribute__((always_inline)) void steps(const U32x16* words, U32x16* step) {
    const U32x16 high = (words[1] << 8 & 0x300) | (words[1] << 22 & 0x3000000);
    const NumbersInHalves numbers(two_bytes(words[0], 0) | high);
    signed_entries_of_eight<kOffset>(codebooks::kIq2SPlus64, numbers, words[0], 2, step);
  }
};

#endif

// And of these without (entries_in_levels.h).
#if !defined(__AVX512F__)

// Four bytes of entries; the block's word has four signs of seven bits.
struct Iq2XxsEntries : Entries<32, 1, 32> {
  static constexpr int kOffset = 64;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    const U32x16 signs = eight_signs(words[1]);
#pragma GCC unroll 2
    for (int k = 0; k < 4; k += 2) {
      signed_entries_of_eight<kOffset>(codebooks::kIq2XxsPlus64, NumbersInBytes(words[0], k), signs,
                                       k, step + 2 * k);
    }
  }
};

// Two entries of nine bits, each below seven bits of signs.
struct Iq2XsEntries : Entries<16, 1, 0> {
  static constexpr int kOffset = 64;
  static inline __attribute__((always_inline)) void steps(const U32x16* words, U32x16* step) {
    const U32x16 sevens = words[0] >> 9 & 0x007f007f;
    const U32x16 signs = with_parity(sevens | sevens >> 8);
    const NumbersInHalves numbers(words[0] & 0x01ff01ff);
    signed_entries_of_eight<kOffset>(codebooks::kIq2XsPlus64, numbers, signs, 0, step);
  }
};

// Two entries of four weights for each lane, with signs 4 n to 4 n + 7, in two steps.
template <int kOffset, class Numbers>
inline __attribute__((always_inline)) void signed_entries_of_four(const uint32_t* table,
                                                                  const Numbers& numbers,
                                                                  U32x16 signs, int n,
                                                                  U32x16* step) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    step[h] = with_signs<kOffset>(load_entries(table, numbers, h), signs, n + h);
  }
}

// Eight bytes of entries of four weights; the block's word has four signs of seven bits.
struct Iq3XxsEntries : Entries<32, 2, 32> {
  static constexpr int kOffset = 64;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    const U32x16 signs = eight_signs(words[2]);
#pragma GCC unroll 4
    for (int t = 0; t < 8; t += 2) {
      signed_entries_of_four<kOffset>(codebooks::kIq3XxsPlus64, NumbersInBytes(words[t / 4], t % 4),
                                      signs, t, step + t);
    }
  }
};

// Eight bytes of entries of four weights, and four of signs; the block's words have a ninth bit of
// each entry.
struct Iq3SEntries : Entries<32, 3, 8> {
  static constexpr int kOffset = 16;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
#pragma GCC unroll 4
    for (int t = 0; t < 8; t += 2) {
      const U32x16 ninth = words[3] >> t;
      const U32x16 high = (ninth << 8 & 0x100) | (ninth << 23 & 0x1000000);
      const NumbersInHalves numbers(two_bytes(words[t / 4], t % 4) | high);
      signed_entries_of_four<kOffset>(codebooks::kIq3SPlus16, numbers, words[2], t, step + t);
    }
  }
};

#endif

}  // namespace lk::LK_ISA

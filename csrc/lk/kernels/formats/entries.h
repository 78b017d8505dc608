// Codes of IQ1, IQ2 and IQ3, which are numbers of entries of tables (lookup.h), and how the entries
// of 16 rows are found: here they are loaded. The words of a unit are, in this order, its own and
// its bits of the block's words.
#pragma once

#include "lk/kernels/formats/codes.h"

namespace lk::LK_ISA {

// Byte n of each lane.
inline U32x16 byte_of(U32x16 a, int n) { return a >> 8 * n & 0xff; }

// Adds the eighth bit to bytes of seven bits, such that the number of ones is even.
inline U32x16 with_parity(U32x16 bytes) {
  // The eighth bit for each four bits.
  alignas(16) static constexpr uint8_t kOdd[16] = {0,   128, 128, 0,   128, 0,   0,   128,
                                                   128, 0,   0,   128, 0,   128, 128, 0};
  return bytes | lookup_bytes(kOdd, (bytes ^ bytes >> 4) & 0x0f0f0f0f);
}
// Four signs of seven bits in the low 28 bits, as bytes.
inline U32x16 eight_signs(U32x16 sevens) {
  return with_parity((sevens & 0x7f) | (sevens << 1 & 0x7f00) | (sevens << 2 & 0x7f0000) |
                     (sevens << 3 & 0x7f000000));
}

// Gives four magnitudes, each plus kOffset, the signs of bits 4 n to 4 n + 3. The results are
// higher by kOffset, too.
template <int kOffset>
inline U32x16 with_signs(U32x16 magnitudes, U32x16 signs, int n) {
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

// AVX-512 finds entries in registers, of these types with VBMI (entries_in_bytes.h).
#if !defined(__AVX512VBMI__)

// An entry of IQ1, in steps 2 k and 2 k + 1.
inline void moved_entry(U32x16 index, U32x16 minus, int k, U32x16* step) {
  U32x16 first, second;
  gather_pairs(codebooks::kIq1Times8Plus16, index, &first, &second);
  step[2 * k] = Iq1::moved(first, minus);
  step[2 * k + 1] = Iq1::moved(second, minus);
}

// Four bytes of entries; the block's words have three more bits of each entry, a scale, and whether
// 1/8 is subtracted.
struct Iq1SEntries : Entries<32, 1, 16>, Iq1 {
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    for (int k = 0; k < 4; ++k) {
      const U32x16 index = byte_of(words[0], k) | (words[1] >> 3 * k & 7) << 8;
      moved_entry(index, words[1] >> 15 & 1, k, step);
    }
  }
};

// Two bytes of entries; the block's words have for each three more bits, and whether 1/8 is
// subtracted.
struct Iq1MEntries : Entries<16, 0, 8>, Iq1 {
  static constexpr bool kHalf = true;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    for (int k = 0; k < 2; ++k) {
      const U32x16 index = byte_of(words[0], k) | (words[1] >> 4 * k & 7) << 8;
      moved_entry(index, words[1] >> (4 * k + 3) & 1, k, step);
    }
  }
};

// An entry of eight weights, in steps 2 k and 2 k + 1, with byte k of the signs.
template <int kOffset>
inline void signed_entry(const uint32_t* table, U32x16 index, U32x16 signs, int k, U32x16* step) {
  U32x16 first, second;
  gather_pairs(table, index, &first, &second);
  step[2 * k] = with_signs<kOffset>(first, signs, 2 * k);
  step[2 * k + 1] = with_signs<kOffset>(second, signs, 2 * k + 1);
}

// Two bytes of entries and two of signs; the block's words have two more bits of each entry.
struct Iq2SEntries : Entries<16, 1, 4> {
  static constexpr int kOffset = 64;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    for (int k = 0; k < 2; ++k) {
      const U32x16 index = byte_of(words[0], k) | (words[1] >> 2 * k & 3) << 8;
      signed_entry<kOffset>(codebooks::kIq2SPlus64, index, words[0] >> 16, k, step);
    }
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
    for (int k = 0; k < 4; ++k) {
      signed_entry<kOffset>(codebooks::kIq2XxsPlus64, byte_of(words[0], k), signs, k, step);
    }
  }
};

// Two entries of nine bits, each below seven bits of signs.
struct Iq2XsEntries : Entries<16, 1, 0> {
  static constexpr int kOffset = 64;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    const U32x16 signs = with_parity(words[0] >> 9 & 0x007f007f);
    for (int k = 0; k < 2; ++k) {
      signed_entry<kOffset>(codebooks::kIq2XsPlus64, words[0] >> 16 * k & 511, signs >> 8 * k, k,
                            step);
    }
  }
};

// Eight bytes of entries of four weights; the block's word has four signs of seven bits.
struct Iq3XxsEntries : Entries<32, 2, 32> {
  static constexpr int kOffset = 64;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    const U32x16 signs = eight_signs(words[2]);
    for (int t = 0; t < 8; ++t) {
      const U32x16 index = byte_of(words[t / 4], t % 4);
      step[t] = with_signs<kOffset>(gather(codebooks::kIq3XxsPlus64, index), signs, t);
    }
  }
};

// Eight bytes of entries of four weights, and four of signs; the block's words have a ninth bit of
// each entry.
struct Iq3SEntries : Entries<32, 3, 8> {
  static constexpr int kOffset = 16;
  static __attribute__((noinline)) void steps(const U32x16* words, U32x16* step) {
    for (int t = 0; t < 8; ++t) {
      const U32x16 index = byte_of(words[t / 4], t % 4) | (words[3] >> t & 1) << 8;
      step[t] = with_signs<kOffset>(gather(codebooks::kIq3SPlus16, index), words[2], t);
    }
  }
};

#endif

}  // namespace lk::LK_ISA

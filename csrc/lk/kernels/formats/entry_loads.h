// Entries of tables, loaded one by one by their numbers, of which each lane has two.
//
// On Zen 3 and Zen 4, so many loads take half as long as instructions that gather.
#pragma once

#include <cstring>

#include "lk/kernels/simd.h"

namespace lk::LK_ISA {

// Numbers of 16 bits, in the halves of lanes.
class NumbersInHalves {
 public:
  explicit NumbersInHalves(U32x16 numbers) {
    std::memcpy(of_two_lanes_, &numbers, sizeof of_two_lanes_);
  }
  int64_t at(int lane, int h) const {
    return static_cast<uint16_t>(of_two_lanes_[lane / 2] >> (lane % 2 * 32 + h * 16));
  }

 private:
  uint64_t of_two_lanes_[kLanes / 2];  // GCC takes 64 bits at a time out of a vector
};

// Numbers of 8 bits, in bytes `byte` and the next of lanes. They are loaded from there, which takes
// fewer instructions.
class NumbersInBytes {
 public:
  NumbersInBytes(const U32x16& lanes, int byte)
      : bytes_(reinterpret_cast<const uint8_t*>(&lanes) + byte) {}
  int64_t at(int lane, int h) const { return bytes_[4 * lane + h]; }

 private:
  const uint8_t* bytes_;
};

// The entries of four bytes by number h of each lane.
template <class Numbers>
inline __attribute__((always_inline)) U32x16 load_entries(const uint32_t* table,
                                                          const Numbers& numbers, int h) {
  U32x16 found;
  for (int i = 0; i < kVectors; ++i) {
    const auto entry = [&](int lane) { return table[numbers.at(i * kVectorLanes + lane, h)]; };
#if defined(__AVX2__) && !defined(__AVX512F__)
    found.v[i] =
        UintVector{entry(0), entry(1), entry(2), entry(3), entry(4), entry(5), entry(6), entry(7)};
#else
    for (int lane = 0; lane < kVectorLanes; ++lane) found.v[i][lane] = entry(lane);
#endif
  }
  return found;
}

// The first and the last four bytes of the entries of eight by number h of each lane.
template <class Numbers>
inline __attribute__((always_inline)) void load_entries(const uint32_t* table,
                                                        const Numbers& numbers, int h,
                                                        U32x16* first, U32x16* last) {
#if defined(__AVX2__)
  const auto two_entries = [&](int lane) {
    const auto* const entries = reinterpret_cast<const double*>(table);
    return _mm_loadh_pd(_mm_load_sd(entries + numbers.at(lane, h)),
                        entries + numbers.at(lane + 1, h));
  };
  const auto four_entries = [&](int lane) {
    return _mm256_set_m128d(two_entries(lane + 4), two_entries(lane));
  };
#if defined(__AVX512F__)
  const auto eight_entries = [&](int lane) {
    const auto low = (__m256i)four_entries(lane), high = (__m256i)four_entries(lane + 8);
    return (__m512)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  };
  const __m512 a = eight_entries(0), b = eight_entries(2);
  first->v[0] = (UintVector)_mm512_shuffle_ps(a, b, 0x88);
  last->v[0] = (UintVector)_mm512_shuffle_ps(a, b, 0xdd);
#else
  for (int i = 0; i < kVectors; ++i) {
    const __m256 a = _mm256_castpd_ps(four_entries(i * kVectorLanes));
    const __m256 b = _mm256_castpd_ps(four_entries(i * kVectorLanes + 2));
    first->v[i] = (UintVector)_mm256_shuffle_ps(a, b, 0x88);
    last->v[i] = (UintVector)_mm256_shuffle_ps(a, b, 0xdd);
  }
#endif
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t* const entry = table + 2 * numbers.at(lane, h);
    first->v[lane / kVectorLanes][lane % kVectorLanes] = entry[0];
    last->v[lane / kVectorLanes][lane % kVectorLanes] = entry[1];
  }
#endif
}

}  // namespace lk::LK_ISA

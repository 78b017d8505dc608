// What the matmul asks of a weight format, a type F in formats/.
//
// F::Math is the arithmetic that multiplies it (arithmetic.h), F::kUnitWeights is how many weights
// along K the four bytes of a unit hold, and F::kOrder is the order in which they are unpacked.
// F::unpack turns one unit each of 16 rows into kSteps<F> vectors. A format with zero points
// defines F::kZeroPoints, one that never has group scales defines F::kNoGroupScales, and one that
// takes longer to unpack than to load unpacked defines F::kSlowUnpack, and one that is unpacked
// with one instruction a vector F::kQuickUnpack. Which scales the weights have, and over which
// groups, is in MatmulArgs. If F::unpack gives multiples of another number than 1, that is
// F::kWeightUnit.
//
// Formats of blocks (blocks.h) have units of F::kWords words of four bytes, and two bytes more with
// F::kHalf. They unpack an array of vectors (codes.h), and read their scales themselves:
// F::load_scales those of F::kGroupsAtOnce groups (in_blocks.h). With F::kSharedBits, so many bits
// of each unit are in its block's first words, and follow the unit's own words when it is unpacked.
// One that unpacks two vectors of rows in less time together than one by one has F::steps_of_two,
// and F::unpack_two for them.
#pragma once

#include "lk/kernels.h"

namespace lk::LK_ISA {

// A block is a run of K whose unpacked weights fit into MatmulArgs::scratch, and so into L1. This
// is its length in steps.
constexpr int64_t kBlockSteps = kUnpackedBytes / (kTileRows * 4);
// A step multiplies one vector of weights: F::Math::kStepWeights along K for each of 16 rows.
template <class F>
constexpr int kSteps = F::kUnitWeights / F::Math::kStepWeights;
template <class F>
constexpr bool kZeroPoints = requires { F::kZeroPoints; };
template <class F>
constexpr bool kGroupScales = !requires { F::kNoGroupScales; };
template <class F>
constexpr bool kSlowUnpack = requires { F::kSlowUnpack; };
template <class F>
constexpr bool kQuickUnpack = requires { F::kQuickUnpack; };
template <class F>
constexpr int kWords = 1;
template <class F>
  requires requires { F::kWords; }
constexpr int kWords<F> = F::kWords;
template <class F>
constexpr bool kHalfWord = false;
template <class F>
  requires requires { F::kHalf; }
constexpr bool kHalfWord<F> = F::kHalf;
// How many vectors hold one unit each of 16 rows, and the bytes of a row's unit.
template <class F>
constexpr int kUnitVectors = kWords<F> + kHalfWord<F>;
template <class F>
constexpr int64_t kUnitRowBytes = kWords<F> * kUnitBytes + kHalfWord<F> * 2;
// How many bits of its block's words a unit has.
template <class F>
constexpr int kSharedBits = 0;
template <class F>
  requires requires { F::kSharedBits; }
constexpr int kSharedBits<F> = F::kSharedBits;
template <class F>
constexpr bool kTogether = requires { &F::steps_of_two; };
template <class F>
constexpr bool kOwnScales = requires { &F::load_scales; };
// How many groups' scales are loaded at a time.
template <class F>
constexpr int kGroupsAtOnce = 1;
template <class F>
  requires requires { F::kGroupsAtOnce; }
constexpr int kGroupsAtOnce<F> = F::kGroupsAtOnce;
// Arithmetic on integers quantises activations; its blocks of activations have scales.
template <class F>
constexpr bool kQuantisedActs = F::Math::kQuantised;
// One sum runs over all of K where neither weights nor activations have scales along K.
template <class F>
constexpr bool kOneSum = !kGroupScales<F> && !kQuantisedActs<F>;
// Whether AMX multiplies the format (amx_tokens.h), and whether it does so even for a few tokens.
template <class F>
constexpr bool kAmx = requires { F::Math::kTiles; };
template <class F>
constexpr bool kStoredAsMultiplied = requires { F::kStoredAsMultiplied; };
template <class F>
constexpr bool kAmxOnly = kAmx<F> && !kQuantisedActs<F>;

}  // namespace lk::LK_ISA

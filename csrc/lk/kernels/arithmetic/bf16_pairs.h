// Arithmetic on pairs of bf16: vdpbf16ps multiplies them, which is exact in float, and adds both
// products to a float.
#pragma once

#include "lk/kernels/arithmetic/floats.h"

#if defined(__AVX512BF16__)

namespace lk::LK_ISA {

struct Bf16Pairs : FloatSums<2> {
  using Products = Bf16Pairs;
  using Weights = __m512bh;
  using Act = __m512bh;
#if defined(__AMX_TILE__)
  static constexpr const char* kName = "bf16 tiles";
#else
  static constexpr const char* kName = "bf16";
#endif
  static constexpr int kStepWeights = 2;

  static Act act(const char* p) { return (__m512bh)broadcast_bits(p); }
  static Sum multiply_add(Sum sum, Weights w, Act a) { return {_mm512_dpbf16_ps(sum.v[0], w, a)}; }
  static Sum multiply_add(Sum sum, Weights w, const char* p) {
    return {add_bf16_products(sum.v[0], w, p)};
  }
#if defined(__AMX_TILE__)
  static constexpr bool kTiles = true;
  template <int kC, int kA, int kB>
  static void multiply_tiles() {
    add_bf16_tiles<kC, kA, kB>();
  }
  static Weights for_tiles(Weights w) { return w; }
  static Sum from_tile(const char* p) { return load(reinterpret_cast<const float*>(p)); }
#endif
  // Packs a block of activations. Returns their sum, as they were rounded.
  template <class F>
  static float pack(const float* values, char* row, int64_t block, int, int64_t) {
    const __m512bh pairs =
        _mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + 16), _mm512_loadu_ps(values));
    const __m512i order = _mm512_broadcast_i32x4(kPackOrder<F, 2>.vector());
    _mm512_storeu_si512(row + block * kActBlock * kActBytes,
                        _mm512_shuffle_epi8((__m512i)pairs, order));
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    return _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), pairs, ones));
  }
};

}  // namespace lk::LK_ISA

#endif

// AVX-512 with VNNI and VBMI: Intel since Ice Lake. Sapphire Rapids multiplies pairs of bf16 at
// half the rate of floats, and so it does best with this (choice.h).
#define LK_ISA avx512_vbmi
#include <type_traits>

#include "lk/kernels/table.h"

namespace lk {
namespace avx512_vbmi {

// VBMI looks codes of fp8 up, scales of mxfp4 and nvfp4, and entries of IQ2_XS and IQ2_S.
template <class F, class... Formats>
constexpr bool kAmong = (std::is_same_v<F, Formats> || ...);
struct New {
  template <class F>
  static constexpr bool kFormat = kAmong<F, Fp8, Fp4, Fp4Act8, Iq2Xs, Iq2XsAct8, Iq2S, Iq2SAct8>;
};

}  // namespace avx512_vbmi

const Kernels& avx512_vbmi_kernels() noexcept {
  // Sums take 20 or 24 of the 32 registers; the others hold weights.
  constexpr avx512_vbmi::Registers kRegisters{.few_rows = 4,
                                              .few_tokens = 5,
                                              .many_rows = 4,
                                              .many_tokens = 6,
                                              .short_rows = 2,
                                              .short_tokens = 7};
  static const Kernels kKernels = avx512_vbmi::newer_kernels_table<avx512_vbmi::New, kRegisters>(
      "avx512_vbmi", avx512_vnni_kernels());
  return kKernels;
}

}  // namespace lk

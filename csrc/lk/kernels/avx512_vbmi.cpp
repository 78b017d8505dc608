// AVX-512 with VNNI and VBMI: Intel since Ice Lake. Sapphire Rapids multiplies pairs of bf16 at
// half the rate of floats, and so it does best with this (choice.h).
#define LK_ISA avx512_vbmi
#include "lk/kernels/table.h"

namespace lk {

const Kernels& avx512_vbmi_kernels() {
  // Sums take 20 or 24 of the 32 registers; the others hold weights.
  constexpr avx512_vbmi::Registers kRegisters{.few_rows = 4,
                                              .few_tokens = 5,
                                              .many_rows = 4,
                                              .many_tokens = 6,
                                              .short_rows = 2,
                                              .short_tokens = 6};
  static constexpr Kernels kKernels = avx512_vbmi::kernels_table<kRegisters>("avx512_vbmi");
  return kKernels;
}

}  // namespace lk

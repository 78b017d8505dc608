// AVX-512 with VNNI, BF16 and VBMI: AMD since Zen 4, Intel since Sapphire Rapids.
#define LK_ISA avx512_bf16
#include "lk/kernels/table.h"

namespace lk {

const Kernels& avx512_bf16_kernels() {
  // Sums take 20 or 24 of the 32 registers; the others hold weights.
  constexpr avx512_bf16::Registers kRegisters{.few_rows = 4,
                                              .few_tokens = 5,
                                              .many_rows = 4,
                                              .many_tokens = 6,
                                              .short_rows = 2,
                                              .short_tokens = 7};
  static constexpr Kernels kKernels = avx512_bf16::kernels_table<kRegisters>("avx512_bf16");
  return kKernels;
}

}  // namespace lk

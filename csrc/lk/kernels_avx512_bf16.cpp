// AVX-512 with VNNI, BF16 and VBMI: AMD since Zen 4, Intel since Sapphire Rapids.
#define LK_ISA avx512_bf16
#include "lk/kernels_table.h"

namespace lk {

const Kernels& avx512_bf16_kernels() {
  // 20 or 24 sums of 32 registers; the rest hold weights.
  static constexpr Kernels kKernels =
      avx512_bf16::kernels_table<avx512_bf16::Registers{4, 5, 4, 6, 2, 7}>("avx512_bf16");
  return kKernels;
}

}  // namespace lk

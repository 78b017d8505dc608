// AVX-512 F, BW, DQ and VL: Intel since Skylake-X.
#define LK_ISA avx512
#include "lk/kernels/table.h"

namespace lk {

const Kernels& avx512_kernels() noexcept {
  // Sums take 20 or 24 of the 32 registers; the others hold weights.
  constexpr avx512::Registers kRegisters{
      .few_rows = 4, .few_tokens = 5, .many_rows = 4, .many_tokens = 6};
  static const Kernels kKernels = avx512::kernels_table<kRegisters>("avx512");
  return kKernels;
}

}  // namespace lk

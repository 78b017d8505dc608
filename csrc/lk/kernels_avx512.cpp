// AVX-512 F, BW, DQ and VL: Intel since Skylake-X.
#define LK_ISA avx512
#include "lk/kernels_table.h"

namespace lk {

const Kernels& avx512_kernels() {
  // 20 or 24 sums of 32 registers; the rest hold weights.
  static constexpr Kernels kKernels =
      avx512::kernels_table<avx512::Registers{4, 5, 4, 6, 0, 0}>("avx512");
  return kKernels;
}

}  // namespace lk

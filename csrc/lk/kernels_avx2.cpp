// AVX2 with FMA and F16C: Intel since Haswell, AMD since Zen.
#define LK_ISA avx2
#include "lk/kernels_table.h"

namespace lk {

const Kernels& avx2_kernels() {
  // 16 lanes are two registers: 8 sums of 16, or 12 where weights need no unpacking.
  static constexpr Kernels kKernels =
      avx2::kernels_table<avx2::Registers{4, 1, 1, 6, 0, 0}>("avx2");
  return kKernels;
}

}  // namespace lk

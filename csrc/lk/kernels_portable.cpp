// Any CPU: the compiler's four-wide vectors at the baseline of the target (SSE2 on x86-64).
#define LK_ISA portable
#include "lk/kernels_table.h"

namespace lk {

const Kernels& portable_kernels() {
  // 16 lanes are four registers: 8 sums of 16.
  static constexpr Kernels kKernels =
      portable::kernels_table<portable::Registers{2, 1, 1, 2, 0, 0}>("portable");
  return kKernels;
}

}  // namespace lk

// Any CPU: the compiler's four-wide vectors at the baseline of the target (SSE2 on x86-64).
#define LK_ISA portable
#include "lk/kernels/table.h"

namespace lk {

const Kernels& portable_kernels() noexcept {
  // 16 lanes take four of the 16 registers, so sums take 8.
  constexpr portable::Registers kRegisters{
      .few_rows = 2, .few_tokens = 1, .many_rows = 1, .many_tokens = 2};
  static const Kernels kKernels = portable::kernels_table<kRegisters>("portable");
  return kKernels;
}

}  // namespace lk

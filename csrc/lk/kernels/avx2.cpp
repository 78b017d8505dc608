// AVX2 with FMA and F16C: Intel since Haswell, AMD since Zen.
#define LK_ISA avx2
#include "lk/kernels/table.h"

namespace lk {

const Kernels& avx2_kernels() noexcept {
  // 16 lanes take two of the 16 registers, so sums take 8, or 12 where weights are already
  // unpacked. Formats with kRowsInTurn have sums of kTokensInTurn tokens instead.
  constexpr avx2::Registers kRegisters{
      .few_rows = 4, .few_tokens = 1, .many_rows = 1, .many_tokens = 6};
  static const Kernels kKernels = avx2::kernels_table<kRegisters>("avx2");
  return kKernels;
}

}  // namespace lk

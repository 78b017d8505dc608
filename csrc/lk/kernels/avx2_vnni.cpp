// AVX-VNNI beside AVX2, without AVX-512: Intel's desktops since Alder Lake.
#define LK_ISA avx2_vnni
#include "lk/kernels/table.h"

namespace lk {

const Kernels& avx2_vnni_kernels() noexcept {
  // As in avx2.cpp.
  constexpr avx2_vnni::Registers kRegisters{
      .few_rows = 4, .few_tokens = 1, .many_rows = 1, .many_tokens = 6};
  static const Kernels kKernels = avx2_vnni::kernels_table<kRegisters>("avx2_vnni");
  return kKernels;
}

}  // namespace lk

// AVX-512 with VNNI: Intel since Cascade Lake.
#define LK_ISA avx512_vnni
#include "lk/kernels/table.h"

namespace lk {

const Kernels& avx512_vnni_kernels() noexcept {
  // Sums take 20 or 24 of the 32 registers; the others hold weights.
  constexpr avx512_vnni::Registers kRegisters{.few_rows = 4,
                                              .few_tokens = 5,
                                              .many_rows = 4,
                                              .many_tokens = 6,
                                              .short_rows = 2,
                                              .short_tokens = 7};
  static const Kernels kKernels = avx512_vnni::kernels_table<kRegisters>("avx512_vnni");
  return kKernels;
}

}  // namespace lk

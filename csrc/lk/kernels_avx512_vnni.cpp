// AVX-512 with VNNI: Intel since Cascade Lake.
#define LK_ISA avx512_vnni
#include "lk/kernels_table.h"

namespace lk {

const Kernels& avx512_vnni_kernels() {
  // 20 or 24 sums of 32 registers; the rest hold weights.
  static constexpr Kernels kKernels =
      avx512_vnni::kernels_table<avx512_vnni::Registers{4, 5, 4, 6, 2, 6}>("avx512_vnni");
  return kKernels;
}

}  // namespace lk

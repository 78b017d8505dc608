// AMX with INT8 and BF16 beside all of AVX-512 BF16: Intel since Sapphire Rapids.
#define LK_ISA amx
#include "lk/kernels/table.h"

namespace lk {

const Kernels& amx_kernels() {
  // For what does not use tiles; as in avx512_bf16.cpp.
  constexpr amx::Registers kRegisters{.few_rows = 4,
                                      .few_tokens = 5,
                                      .many_rows = 4,
                                      .many_tokens = 6,
                                      .short_rows = 2,
                                      .short_tokens = 7};
  static constexpr Kernels kKernels = amx::kernels_table<kRegisters>("amx");
  return kKernels;
}

}  // namespace lk

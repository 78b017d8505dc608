// AMX with INT8 and BF16 beside all of AVX-512 BF16: Intel since Sapphire Rapids.
#define LK_ISA amx
#include "lk/kernels/table.h"

namespace lk {
namespace amx {

// What is multiplied in tiles.
struct New {
  template <class F>
  static constexpr bool kFormat = kAmx<F>;
};

}  // namespace amx

const Kernels& amx_kernels() noexcept {
  // For what does not use tiles; as in avx512_bf16.cpp.
  constexpr amx::Registers kRegisters{.few_rows = 4,
                                      .few_tokens = 5,
                                      .many_rows = 4,
                                      .many_tokens = 6,
                                      .short_rows = 2,
                                      .short_tokens = 7};
  static const Kernels kKernels =
      amx::newer_kernels_table<amx::New, kRegisters>("amx", avx512_bf16_kernels());
  return kKernels;
}

}  // namespace lk

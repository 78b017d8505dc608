// AVX-512 with VNNI, BF16 and VBMI: AMD since Zen 4, Intel since Sapphire Rapids.
#define LK_ISA avx512_bf16
#include <type_traits>

#include "lk/kernels/table.h"

namespace lk {
namespace avx512_bf16 {

// What is multiplied as bf16.
struct New {
  template <class F>
  static constexpr bool kFormat = std::is_same_v<typename F::Math, Bf16Pairs>;
};

}  // namespace avx512_bf16

const Kernels& avx512_bf16_kernels() noexcept {
  // Sums take 20 or 24 of the 32 registers; the others hold weights.
  constexpr avx512_bf16::Registers kRegisters{.few_rows = 4,
                                              .few_tokens = 5,
                                              .many_rows = 4,
                                              .many_tokens = 6,
                                              .short_rows = 2,
                                              .short_tokens = 7};
  static const Kernels kKernels = avx512_bf16::newer_kernels_table<avx512_bf16::New, kRegisters>(
      "avx512_bf16", avx512_vbmi_kernels());
  return kKernels;
}

}  // namespace lk

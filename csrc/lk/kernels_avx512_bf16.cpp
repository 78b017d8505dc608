// AVX-512 with BF16: AMD since Zen 4, Intel since Cooper Lake and Sapphire Rapids.
#define LK_ISA avx512_bf16
#include "lk/activation.h"
#include "lk/formats/bf16.h"
#include "lk/formats/fp16.h"
#include "lk/matmul.h"

namespace lk {

const Kernels& avx512_bf16_kernels() {
  using namespace avx512_bf16;
  // 4 x 6 accumulators and 4 rows of weights: 28 of 32 registers.
  static constexpr Kernels kKernels{
      "avx512_bf16",
      {sizeof(Bf16::Act), matmul<Bf16, 4, 6>, pack<Bf16>, activate<Bf16>},
      {sizeof(Fp16::Act), matmul<Fp16, 2, 6>, pack<Fp16>, activate<Fp16>},
      combine};
  return kKernels;
}

}  // namespace lk

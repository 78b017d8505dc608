// AVX2 with FMA and F16C: Intel since Haswell, AMD since Zen.
#define LK_ISA avx2
#include "lk/activation.h"
#include "lk/formats/bf16.h"
#include "lk/formats/fp16.h"
#include "lk/matmul.h"

namespace lk {

const Kernels& avx2_kernels() {
  using namespace avx2;
  // 2 x 2 accumulators of two registers and 2 rows of weights: 12 of 16 registers.
  static constexpr Kernels kKernels{
      "avx2",
      {sizeof(Bf16::Act), matmul<Bf16, 1, 3>, pack<Bf16>, activate<Bf16>},
      {sizeof(Fp16::Act), matmul<Fp16, 1, 3>, pack<Fp16>, activate<Fp16>},
      combine};
  return kKernels;
}

}  // namespace lk

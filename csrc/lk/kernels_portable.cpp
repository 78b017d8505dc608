// Any CPU: the compiler's four-wide vectors at the baseline of the target (SSE2 on x86-64).
#define LK_ISA portable
#include "lk/activation.h"
#include "lk/formats/bf16.h"
#include "lk/formats/fp16.h"
#include "lk/matmul.h"

namespace lk {

const Kernels& portable_kernels() {
  using namespace portable;
  static constexpr Kernels kKernels{
      "portable",
      {sizeof(Bf16::Act), matmul<Bf16, 1, 2>, pack<Bf16>, activate<Bf16>},
      {sizeof(Fp16::Act), matmul<Fp16, 1, 2>, pack<Fp16>, activate<Fp16>},
      combine};
  return kKernels;
}

}  // namespace lk

// The table of functions of one instruction set. Included only by the kernels_*.cpp, which say what
// its registers hold.
#pragma once

#include "lk/activation.h"
#include "lk/formats/bf16.h"
#include "lk/formats/fp16.h"
#include "lk/formats/fp4.h"
#include "lk/formats/fp8.h"
#include "lk/formats/int4.h"
#include "lk/formats/int8.h"
#include "lk/matmul.h"
#include "lk/vectors.h"

namespace lk::LK_ISA {

template <class F, Registers R>
constexpr FormatKernels format_kernels() {
  return {act_row_bytes<F>, pack<F>, matmul<F, R>};
}

// In the order of enum Format.
template <Registers R>
constexpr Kernels kernels_table(const char* isa) {
  return {isa,
          {format_kernels<Bf16, R>(), format_kernels<Fp16, R>(), format_kernels<Fp8, R>(),
           format_kernels<Int8, R>(), format_kernels<Int8Act8, R>(), format_kernels<Int4, R>(),
           format_kernels<Int4Act8, R>(), format_kernels<Int4Zero, R>(),
           format_kernels<Int4ZeroAct8, R>(), format_kernels<Fp4, R>()},
          widen,
          finish,
          activate,
          combine};
}

}  // namespace lk::LK_ISA

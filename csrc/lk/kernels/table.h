// The table of functions of one instruction set, which the unit that includes this (avx2.cpp and
// its like) makes with the sums that fit into its registers.
#pragma once

#include "lk/kernels/activation_functions.h"
#include "lk/kernels/formats/bf16.h"
#include "lk/kernels/formats/fp16.h"
#include "lk/kernels/formats/fp4.h"
#include "lk/kernels/formats/fp8.h"
#include "lk/kernels/formats/int4.h"
#include "lk/kernels/formats/int8.h"
#include "lk/kernels/formats/k_quants.h"
#include "lk/kernels/formats/lookup.h"
#include "lk/kernels/formats/small_blocks.h"
#include "lk/kernels/matmul.h"
#include "lk/kernels/rate.h"
#include "lk/kernels/row_operations.h"

namespace lk::LK_ISA {

template <class F, Registers R>
constexpr FormatKernels format_kernels(const char* isa) {
  FormatKernels kernels{isa,           F::Math::kName, multiply_in_registers<typename F::Math>,
                        kActBlockLog2, kActBlockLog2,  act_row_bytes<F>,
                        pack<F>,       matmul<F, R>};
  if constexpr (kQuantisedActs<F>) {
    kernels.most_block_log2 = F::Math::kMostBlockLog2;
    kernels.outlier_block_log2 = F::Math::kOutlierBlockLog2;
  }
#if defined(__AMX_TILE__)
  if constexpr (kAmx<F>) {
    kernels.gather_from = kAmxOnly<F> ? 1 : R.few_tokens + 1;
    kernels.gather = amx_gather<F>;
    kernels.gathered_bytes = amx_gathered_bytes<F>;
  }
#endif
  return kernels;
}

// The formats are in the order of enum Format.
template <Registers R>
constexpr Kernels kernels_table(const char* isa) {
  return {isa,
          {format_kernels<Bf16, R>(isa),
           format_kernels<Fp16, R>(isa),
           format_kernels<Fp8, R>(isa),
           format_kernels<Int8, R>(isa),
           format_kernels<Int8Act8, R>(isa),
           format_kernels<Int8Groups, R>(isa),
           format_kernels<Int8GroupsAct8, R>(isa),
           format_kernels<Int4, R>(isa),
           format_kernels<Int4Act8, R>(isa),
           format_kernels<Int4Zero, R>(isa),
           format_kernels<Int4ZeroAct8, R>(isa),
           format_kernels<Fp4, R>(isa),
           format_kernels<Fp4Act8, R>(isa),
           format_kernels<Q2K, R>(isa),
           format_kernels<Q2KAct8, R>(isa),
           format_kernels<Q3K, R>(isa),
           format_kernels<Q3KAct8, R>(isa),
           format_kernels<Q4K, R>(isa),
           format_kernels<Q4KAct8, R>(isa),
           format_kernels<Q5K, R>(isa),
           format_kernels<Q5KAct8, R>(isa),
           format_kernels<Q6K, R>(isa),
           format_kernels<Q6KAct8, R>(isa),
           format_kernels<Q41, R>(isa),
           format_kernels<Q41Act8, R>(isa),
           format_kernels<Q50, R>(isa),
           format_kernels<Q50Act8, R>(isa),
           format_kernels<Q51, R>(isa),
           format_kernels<Q51Act8, R>(isa),
           format_kernels<Iq4Nl, R>(isa),
           format_kernels<Iq4NlAct8, R>(isa),
           format_kernels<Iq4Xs, R>(isa),
           format_kernels<Iq4XsAct8, R>(isa),
           format_kernels<Iq1S, R>(isa),
           format_kernels<Iq1SAct8, R>(isa),
           format_kernels<Iq1M, R>(isa),
           format_kernels<Iq1MAct8, R>(isa),
           format_kernels<Iq2Xxs, R>(isa),
           format_kernels<Iq2XxsAct8, R>(isa),
           format_kernels<Iq2Xs, R>(isa),
           format_kernels<Iq2XsAct8, R>(isa),
           format_kernels<Iq2S, R>(isa),
           format_kernels<Iq2SAct8, R>(isa),
           format_kernels<Iq3Xxs, R>(isa),
           format_kernels<Iq3XxsAct8, R>(isa),
           format_kernels<Iq3S, R>(isa),
           format_kernels<Iq3SAct8, R>(isa)},
          widen,
          finish,
          end_stream,
          activate,
          combine};
}

}  // namespace lk::LK_ISA

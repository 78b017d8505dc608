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
  FormatKernels kernels{
      isa,           F::Math::kName, multiply_in_registers<typename F::Math::Products>,
      kActBlockLog2, kActBlockLog2,  act_row_bytes<F>,
      pack<F>,       matmul<F, R>};
  if constexpr (kQuantisedActs<F>) {
    kernels.most_block_log2 = F::Math::kMostBlockLog2;
    kernels.outlier_block_log2 = F::Math::kOutlierBlockLog2;
  }
#if defined(__AMX_TILE__)
  if constexpr (kAmx<F>) {
    kernels.gather_from = kAmxOnly<F> ? 1 : R.few_tokens + 1;
    kernels.gather = amx_gather<Unpacked<F>>;
    kernels.gathered_bytes = amx_gathered_bytes<Unpacked<F>>;
  }
#endif
  return kernels;
}

// Calls `call`, a lambda with a template parameter for the format's type, for each format.
template <class Call>
void for_each_format(Call&& call) {
  call.template operator()<Bf16>(Format::kBf16);
  call.template operator()<Fp16>(Format::kFp16);
  call.template operator()<Fp8>(Format::kFp8);
  call.template operator()<Int8>(Format::kInt8);
  call.template operator()<Int8Act8>(Format::kInt8Act8);
  call.template operator()<Int8Groups>(Format::kInt8Groups);
  call.template operator()<Int8GroupsAct8>(Format::kInt8GroupsAct8);
  call.template operator()<Int4>(Format::kInt4);
  call.template operator()<Int4Act8>(Format::kInt4Act8);
  call.template operator()<Int4Zero>(Format::kInt4Zero);
  call.template operator()<Int4ZeroAct8>(Format::kInt4ZeroAct8);
  call.template operator()<Fp4>(Format::kFp4);
  call.template operator()<Fp4Act8>(Format::kFp4Act8);
  call.template operator()<Q2K>(Format::kQ2K);
  call.template operator()<Q2KAct8>(Format::kQ2KAct8);
  call.template operator()<Q3K>(Format::kQ3K);
  call.template operator()<Q3KAct8>(Format::kQ3KAct8);
  call.template operator()<Q4K>(Format::kQ4K);
  call.template operator()<Q4KAct8>(Format::kQ4KAct8);
  call.template operator()<Q5K>(Format::kQ5K);
  call.template operator()<Q5KAct8>(Format::kQ5KAct8);
  call.template operator()<Q6K>(Format::kQ6K);
  call.template operator()<Q6KAct8>(Format::kQ6KAct8);
  call.template operator()<Q41>(Format::kQ41);
  call.template operator()<Q41Act8>(Format::kQ41Act8);
  call.template operator()<Q50>(Format::kQ50);
  call.template operator()<Q50Act8>(Format::kQ50Act8);
  call.template operator()<Q51>(Format::kQ51);
  call.template operator()<Q51Act8>(Format::kQ51Act8);
  call.template operator()<Iq4Nl>(Format::kIq4Nl);
  call.template operator()<Iq4NlAct8>(Format::kIq4NlAct8);
  call.template operator()<Iq4Xs>(Format::kIq4Xs);
  call.template operator()<Iq4XsAct8>(Format::kIq4XsAct8);
  call.template operator()<Iq1S>(Format::kIq1S);
  call.template operator()<Iq1SAct8>(Format::kIq1SAct8);
  call.template operator()<Iq1M>(Format::kIq1M);
  call.template operator()<Iq1MAct8>(Format::kIq1MAct8);
  call.template operator()<Iq2Xxs>(Format::kIq2Xxs);
  call.template operator()<Iq2XxsAct8>(Format::kIq2XxsAct8);
  call.template operator()<Iq2Xs>(Format::kIq2Xs);
  call.template operator()<Iq2XsAct8>(Format::kIq2XsAct8);
  call.template operator()<Iq2S>(Format::kIq2S);
  call.template operator()<Iq2SAct8>(Format::kIq2SAct8);
  call.template operator()<Iq3Xxs>(Format::kIq3Xxs);
  call.template operator()<Iq3XxsAct8>(Format::kIq3XxsAct8);
  call.template operator()<Iq3S>(Format::kIq3S);
  call.template operator()<Iq3SAct8>(Format::kIq3SAct8);
}

template <Registers R>
Kernels kernels_table(const char* isa) {
  Kernels table{isa, {}, widen, finish, end_stream, activate, combine};
  for_each_format([&]<class F>(Format format) {
    table.formats[static_cast<int>(format)] = format_kernels<F, R>(isa);
  });
  return table;
}

// The table of an instruction set that adds something to that of `older`, for the formats F with
// New::kFormat<F>. The others have the functions of `older`, so that nothing is compiled twice.
template <class New, Registers R>
Kernels newer_kernels_table(const char* isa, const Kernels& older) {
  Kernels table = older;
  table.isa = isa;
  for_each_format([&]<class F>(Format format) {
    FormatKernels& kernels = table.formats[static_cast<int>(format)];
    kernels.isa = isa;
    if constexpr (New::template kFormat<F>) kernels = format_kernels<F, R>(isa);
  });
  return table;
}

}  // namespace lk::LK_ISA

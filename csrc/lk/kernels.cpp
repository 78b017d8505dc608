#include "lk/kernels.h"

#include <stdexcept>

namespace lk {
namespace {

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512_bf16() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

#if !defined(__x86_64__)
const Kernels& avx2_kernels() { return portable_kernels(); }
const Kernels& avx512_bf16_kernels() { return portable_kernels(); }
#endif

const Kernels& choose_kernels(const std::string& isa) {
  if (isa == "portable") return portable_kernels();
  if (isa == "avx2" && has_avx2()) return avx2_kernels();
  if (isa == "avx512_bf16" && has_avx512_bf16()) return avx512_bf16_kernels();
  if (isa.empty()) {
    if (has_avx512_bf16()) return avx512_bf16_kernels();
    if (has_avx2()) return avx2_kernels();
    return portable_kernels();
  }
  std::string here = "portable";
  if (has_avx2()) here += ", avx2";
  if (has_avx512_bf16()) here += ", avx512_bf16";
  throw std::invalid_argument("LK_ISA is \"" + isa +
                              "\", must be one of those this CPU runs: " + here);
}

}  // namespace lk

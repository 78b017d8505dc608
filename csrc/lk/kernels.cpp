#include "lk/kernels.h"

#include <stdexcept>

#include "lk/amx_access.h"

namespace lk {
namespace {

#if defined(__x86_64__)

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

#if defined(LK_BEYOND_AVX2) && defined(LK_EMULATE)

bool has_avx2_vnni() { return has_avx2(); }
bool has_avx512() { return has_avx2(); }
bool has_avx512_vnni() { return has_avx2(); }
bool has_avx512_vbmi() { return has_avx2(); }
bool has_avx512_bf16() { return has_avx2(); }
bool has_amx() { return has_avx2(); }

#elif defined(LK_BEYOND_AVX2)

bool has_avx2_vnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_avx512_vbmi() { return has_avx512_vnni() && __builtin_cpu_supports("avx512vbmi"); }

bool has_avx512_bf16() { return has_avx512_vbmi() && __builtin_cpu_supports("avx512bf16"); }

bool has_amx() { return has_avx512_bf16() && cpu_has_amx() && amx_refusal() == 0; }

#endif
#endif

struct Choice {
  const char* name;
  bool (*available)();
  const Kernels& (*kernels)();
};

// The instruction sets, the newer ones and those with wider vectors last.
constexpr Choice kChoices[] = {
    {"portable", [] { return true; }, portable_kernels},
#if defined(__x86_64__)
    {"avx2", has_avx2, avx2_kernels},
#endif
#if defined(LK_BEYOND_AVX2)
    {"avx2_vnni", has_avx2_vnni, avx2_vnni_kernels},
    {"avx512", has_avx512, avx512_kernels},
    {"avx512_vnni", has_avx512_vnni, avx512_vnni_kernels},
    {"avx512_vbmi", has_avx512_vbmi, avx512_vbmi_kernels},
    {"avx512_bf16", has_avx512_bf16, avx512_bf16_kernels},
    {"amx", has_amx, amx_kernels},
#endif
};

}  // namespace

std::vector<std::string> available_kernels() {
  std::vector<std::string> names;
  for (const Choice& choice : kChoices) {
    if (choice.available()) names.push_back(choice.name);
  }
  return names;
}

const Kernels& kernels_named(const std::string& isa) {
  std::string here;
  for (const std::string& name : available_kernels()) here += (here.empty() ? "" : ", ") + name;
  for (const Choice& choice : kChoices) {
    if (isa == choice.name && choice.available()) return choice.kernels();
  }
  if (isa == "amx" && cpu_has_amx() && amx_refusal() != 0) {
    throw std::invalid_argument(amx_refused(amx_refusal()) + "; must be one of: " + here);
  }
  throw std::invalid_argument("LK_ISA is \"" + isa +
                              "\", must be one of those this CPU runs: " + here);
}

}  // namespace lk

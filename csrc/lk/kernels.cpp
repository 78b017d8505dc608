#include "lk/kernels.h"

#include <stdexcept>

namespace lk {
namespace {

#if defined(__x86_64__)

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_avx512_bf16() {
  return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi");
}

#endif

struct Choice {
  const char* name;
  bool (*available)();
  const Kernels& (*kernels)();
};

// The instruction sets from the slowest to the fastest.
constexpr Choice kChoices[] = {
    {"portable", [] { return true; }, portable_kernels},
#if defined(__x86_64__)
    {"avx2", has_avx2, avx2_kernels},
    {"avx512", has_avx512, avx512_kernels},
    {"avx512_vnni", has_avx512_vnni, avx512_vnni_kernels},
    {"avx512_bf16", has_avx512_bf16, avx512_bf16_kernels},
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

const Kernels& choose_kernels(const std::string& isa) {
  const std::vector<std::string> names = available_kernels();
  const std::string& wanted = isa.empty() ? names.back() : isa;
  std::string here;
  for (const std::string& name : names) here += (here.empty() ? "" : ", ") + name;
  for (const Choice& choice : kChoices) {
    if (wanted == choice.name && choice.available()) return choice.kernels();
  }
  throw std::invalid_argument("LK_ISA is \"" + isa +
                              "\", must be one of those this CPU runs: " + here);
}

}  // namespace lk

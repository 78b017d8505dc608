#include "lk/choice.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>

namespace lk {
namespace {

// The best of a few runs of 20 us: other programs and the clock's ramp slow down some of them.
double measured_rate(const FormatKernels& format) {
  double best = 0;
  for (int run = 0; run < 8; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    const auto weights = static_cast<double>(format.multiply_in_registers());
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, weights / seconds.count());
  }
  return best;
}

}  // namespace

Choice choose(const std::vector<const Kernels*>& candidates,
              const std::function<double(const FormatKernels&)>& rate) {
  Choice choice{*candidates.back(), {}};
  std::map<decltype(FormatKernels::multiply_in_registers), double> measured;
  // A newer instruction set may have the function of an older one, which is measured once.
  const auto rate_of = [&](const FormatKernels& format) {
    for (const Rate& known : choice.rates) {
      if (std::strcmp(known.isa, format.isa) == 0 &&
          std::strcmp(known.arithmetic, format.arithmetic) == 0) {
        return known.weights;
      }
    }
    const auto [found, is_new] = measured.try_emplace(format.multiply_in_registers);
    if (is_new) found->second = rate(format);
    choice.rates.push_back({format.isa, format.arithmetic, found->second});
    return found->second;
  };
  for (int i = 0; i < kFormats; ++i) {
    FormatKernels& chosen = choice.kernels.formats[i];
    for (size_t c = candidates.size() - 1; c-- > 0;) {
      const FormatKernels& other = candidates[c]->formats[i];
      if (std::strcmp(other.arithmetic, chosen.arithmetic) == 0) continue;
      if (rate_of(other) > kWorthwhile * rate_of(chosen)) chosen = other;
    }
    rate_of(chosen);
  }
  return choice;
}

const Choice& fastest_kernels() {
  static const Choice choice = [] {
    std::vector<const Kernels*> candidates;
    for (const std::string& isa : available_kernels()) candidates.push_back(&kernels_named(isa));
    return choose(candidates, measured_rate);
  }();
  return choice;
}

const Kernels& choose_kernels(const std::string& isa) {
  return isa.empty() ? fastest_kernels().kernels : kernels_named(isa);
}

}  // namespace lk

// Which kernels compute which format: what the CPU does fastest, not what it lists.
//
// Sapphire Rapids has vdpbf16ps, at half the rate of vfmadd231ps (86 against 176 GFLOP/s a core);
// on Zen 4 and Zen 5 it is twice as fast as floats. So the rates are measured.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "lk/kernels.h"

namespace lk {

// How many weights one core multiplies by an activation each second, from registers.
struct Rate {
  const char* isa;
  const char* arithmetic;
  double weights;
};

struct Choice {
  Kernels kernels;
  std::vector<Rate> rates;  // of the arithmetics that were compared, and of those chosen
};

// Takes each format's functions from the last of `candidates` (which are as in available_kernels),
// unless another arithmetic of an earlier one is faster by kWorthwhile. The arithmetics of one
// format are equally accurate, or better without bytes. `rate` is called once for each function
// multiply_in_registers.
Choice choose(const std::vector<const Kernels*>& candidates,
              const std::function<double(const FormatKernels&)>& rate);

// Rates of one CPU differ by a factor of 2 or 4, or not at all. So a measurement that is off by a
// fifth changes nothing, and two machines of the same model choose alike.
constexpr double kWorthwhile = 1.4;

// The choice for this CPU. It is measured at the first call, which takes about a millisecond.
const Choice& fastest_kernels();

// The kernels of that name, or the fastest ones if `isa` is empty. Throws like kernels_named.
const Kernels& choose_kernels(const std::string& isa);

}  // namespace lk

// fp16 weights: widened to float. No CPU before AVX512-FP16 multiplies halves, and that one would
// add them in half precision.
#pragma once

#include "lk/formats/widened.h"

namespace lk::LK_ISA {

using Fp16 = Widened<load_fp16>;

}  // namespace lk::LK_ISA

// e2m1 weights (OCP Microscaling Formats 1.0): mxfp4 and nvfp4 differ only in their scales.
#pragma once

#include "lk/kernels/nibbles.h"

namespace lk::LK_ISA {

struct E2m1Values {
  alignas(64) static constexpr float kFloat[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,
                                                   4.0f,  6.0f,  -0.0f, -0.5f, -1.0f, -1.5f,
                                                   -2.0f, -3.0f, -4.0f, -6.0f};
  alignas(64) static constexpr uint16_t kBf16[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
                                                     0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0,
                                                     0xc000, 0xc040, 0xc080, 0xc0c0};
};

struct Fp4 : Nibbles<E2m1Values> {};

}  // namespace lk::LK_ISA

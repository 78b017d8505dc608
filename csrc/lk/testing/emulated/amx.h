// AMX for the emulated build, see avx512.h and tile_registers.h.
#pragma once

#include "lk/testing/emulated/avx512_bf16.h"
#include "lk/testing/emulated/tile_registers.h"

#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#define __AMX_BF16__ 1

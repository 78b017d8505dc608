// The ways to multiply weights with activations: as floats, as pairs of bf16, as pairs of 16-bit
// integers, or as four bytes.
//
// Each arithmetic says what one step multiplies and how activations are packed for it. A step
// multiplies kStepWeights consecutive weights of 16 rows, in one 64-byte vector, with as many
// activations, which all rows share. multiply_add takes activations from a register, where several
// vectors of rows share them, or from memory: if GCC may choose, it keeps more of them in registers
// than there are.
//
// Arithmetics that have kTiles also multiply in AMX's tile registers: multiply_tiles adds a product
// to the sums of a tile, and from_tile turns those of one token and 16 rows, in memory, into a Sum.
//
// Where activations are quantised, a packed row holds for each block its scale and what sums over
// the block begin with, at block_info_offset(k, block).
#pragma once

#include "lk/kernels/arithmetic/bf16_pairs.h"
#include "lk/kernels/arithmetic/bytes.h"
#include "lk/kernels/arithmetic/floats.h"
#include "lk/kernels/arithmetic/int16_pairs.h"

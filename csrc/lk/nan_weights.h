// NaN among fp8 weights.
#pragma once

#include "lk/layer.h"
#include "lk/thread_pool.h"

namespace lk {

// Sets the scale of each NaN weight to NaN, and so makes the sums NaN that it takes part in;
// weights that share its scale become NaN, too. Kernels then need no test for the code of NaN,
// which took a quarter of their instructions at 1 token on AVX2. Other formats than fp8 are left as
// they are: theirs have no NaN, or its arithmetic needs no test. The matrix is row-major, as it
// came.
void mark_nan_weights(const Matrix& matrix, int64_t experts, ThreadPool& pool);

}  // namespace lk

// Counts what the tests allocate, to see that the hot path does not.
#pragma once

#include <cstdint>

namespace lk {

// False under a sanitizer, which brings an operator new of its own.
bool counts_allocations();
// Calls of operator new so far, in any thread.
int64_t allocations();

}  // namespace lk

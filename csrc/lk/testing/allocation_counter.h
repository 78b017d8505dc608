// Counts allocations, so that tests can check that the hot path makes none.
#pragma once

#include <cstdint>

namespace lk {

// Whether allocations are counted: not under a sanitizer, which has its own operator new.
bool counts_allocations();
// How many times operator new was called so far, by all threads.
int64_t allocations();

}  // namespace lk

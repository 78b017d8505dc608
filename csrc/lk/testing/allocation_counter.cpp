#include "lk/testing/allocation_counter.h"

#include <atomic>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define LK_COUNTS_ALLOCATIONS 0
#else
#define LK_COUNTS_ALLOCATIONS 1
#endif

namespace {
std::atomic<int64_t> count{0};
}

#if LK_COUNTS_ALLOCATIONS
// If only one of new and delete is inlined, GCC warns that malloc or free does not match.
void* operator new(size_t size) {
  ++count;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }
#endif

namespace lk {

bool counts_allocations() { return LK_COUNTS_ALLOCATIONS != 0; }
int64_t allocations() { return count; }

}  // namespace lk

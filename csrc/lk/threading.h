// What the engine's threads share and wait with: atomic words, futexes, threads and the clock. A
// build with LK_SIMULATION takes those of a simulated machine, which counts what a call does on any
// number of cores.
#pragma once

#ifdef LK_SIMULATION
#include "lk/testing/simulation.h"
#else

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace lk {

template <class T>
using Atomic = std::atomic<T>;
using Thread = std::thread;
using Clock = std::chrono::steady_clock;

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() returns true or `patience` is over. Returns whether it was done. All that
// done() looks at is in one cache line.
template <class Done>
bool spin_until(Done&& done, std::chrono::microseconds patience) {
  for (int turn = 0; turn < 32; ++turn) {  // about 1 us before the clock is looked at
    if (done()) return true;
    cpu_pause();
  }
  const auto end = Clock::now() + patience;
  do {
    for (int turn = 0; turn < 32; ++turn) {
      if (done()) return true;
      cpu_pause();
    }
  } while (Clock::now() < end);
  return false;
}

inline void futex_wait(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr);
}

// Wakes at most `count` of the threads that sleep on `word`.
inline void futex_wake(std::atomic<uint32_t>& word, int count) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, count);
}

// The stores before it are visible to all threads before the loads after it are done.
inline void full_fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// Gives a cache line its name in the counts of a simulation.
inline void name_line(const void*, const char*) {}

}  // namespace lk

#endif

// How a thread waits for another: it spins, then sleeps on a futex. It never yields: sched_yield is
// a system call in every turn, and sleeping gives the core away for longer.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>

namespace lk {

// A futex wake-up costs about 50 us on a virtual machine, so a thread spins that long before it
// sleeps. Between calls it does not spin longer, because attention and other work between two MoE
// layers need these cores.
constexpr auto kIdleSpin = std::chrono::microseconds(50);
// Inside a call, a thread waits for a piece of work that is already running, or for a thread that
// lost its core, which takes milliseconds.
constexpr auto kBusySpin = std::chrono::microseconds(200);

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() returns true or `patience` is over. Returns whether it was done.
template <class Done>
bool spin_until(Done&& done, std::chrono::microseconds patience) {
  for (int turn = 0; turn < 32; ++turn) {  // about 1 us before the clock is looked at
    if (done()) return true;
    cpu_pause();
  }
  const auto end = std::chrono::steady_clock::now() + patience;
  do {
    for (int turn = 0; turn < 32; ++turn) {
      if (done()) return true;
      cpu_pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

inline void futex_wait(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr);
}

inline void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX);
}

// A count that some threads lower while others wait for zero. What a thread wrote before subtract()
// is visible after wait().
class alignas(64) Countdown {
 public:
  void add(uint32_t count) { left_.fetch_add(count); }

  // The object must outlive the last subtract(), not only the last wait().
  void subtract(uint32_t count) {
    // A waiting thread adds itself to sleepers_ before it reads left_ again. Here left_ is lowered
    // before sleepers_ is read. All these operations have a single order, so one of the two threads
    // sees what the other did.
    if (left_.fetch_sub(count) == count && sleepers_.load() != 0) futex_wake_all(left_);
  }

  bool zero() const { return left_.load(std::memory_order_acquire) == 0; }

  void wait() {
    if (spin_until([&] { return zero(); }, kBusySpin)) return;
    sleepers_.fetch_add(1);
    for (uint32_t left = left_.load(); left != 0; left = left_.load()) futex_wait(left_, left);
    sleepers_.fetch_sub(1);
  }

 private:
  std::atomic<uint32_t> left_{0};
  std::atomic<uint32_t> sleepers_{0};
};

}  // namespace lk

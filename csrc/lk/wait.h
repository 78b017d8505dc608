// How a thread waits for another: it spins, then sleeps on a futex. It never yields: sched_yield is
// a system call a turn, and a core that is given away for good is worth more to who needs it.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>

namespace lk {

// A futex wake-up costs about 50 us on a virtual machine, so waits shorter than that are spun.
// Between calls no longer: attention and the other work between two MoE layers need these cores.
constexpr auto kIdleSpin = std::chrono::microseconds(50);
// Inside a call the wait is for a piece of work that already runs, or for a thread that lost its
// core, which stays away for milliseconds.
constexpr auto kBusySpin = std::chrono::microseconds(200);

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() or until patience ends; whether it was done.
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

// A count that some threads take down while others wait for zero. What was written before
// subtract() is seen after wait().
class alignas(64) Countdown {
 public:
  void add(uint32_t count) { left_.fetch_add(count); }

  // The object must outlive the last subtract(), not only the last wait().
  void subtract(uint32_t count) {
    // The sleeper counts itself before it looks at left_ again, and here left_ goes down before the
    // sleepers are counted: in the single order of these operations one of the two sees the other.
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

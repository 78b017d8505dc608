// How a thread waits for another: it spins, then sleeps on a futex. It never yields: sched_yield is
// a system call in every turn, and sleeping gives the core away for longer.
#pragma once

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>

#include "lk/threading.h"

namespace lk {

// A futex wake-up costs about 50 us on a virtual machine, so a thread spins that long before it
// sleeps. Between calls it does not spin longer where attention and other work between two MoE
// layers need these cores.
constexpr auto kIdleSpin = std::chrono::microseconds(50);
// The longest that a thread spins between calls where nothing else needs its core.
constexpr auto kLongestIdleSpin = std::chrono::microseconds(2000);
// Inside a call, a thread waits for a piece of work that is already running, or for a thread that
// lost its core, which takes milliseconds. A piece of 1 MiB takes 260 us at 4 GB/s, a core's share
// of the bandwidth where a socket has 96.
constexpr auto kBusySpin = std::chrono::microseconds(500);

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
    if (left_.fetch_sub(count) == count && sleepers_.load() != 0) futex_wake(left_, INT_MAX);
  }

  bool zero() const { return left_.load(std::memory_order_acquire) == 0; }

  void wait() {
    if (spin_until([&] { return zero(); }, kBusySpin)) return;
    sleepers_.fetch_add(1);
    for (uint32_t left = left_.load(); left != 0; left = left_.load()) futex_wait(left_, left);
    sleepers_.fetch_sub(1);
  }

 private:
  Atomic<uint32_t> left_{0};
  Atomic<uint32_t> sleepers_{0};
};

}  // namespace lk

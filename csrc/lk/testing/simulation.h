// A simulated machine with any number of cores and sockets, on which the engine's own threads run
// one at a time, so that two cores are enough. Each thread has a clock. Whenever a thread touches a
// shared word, the thread whose clock is the earliest goes on, and the word's cache line and its
// copies in other cores decide how far the clock moves. So a run has the same counts each time.
//
// The times follow from Costs, which are assumptions. Only what is shared through Atomic counts;
// the arithmetic takes no time except what a test adds with work() and read_memory(). Memory orders
// are not simulated: ThreadSanitizer is for those.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace lk {
namespace simulation {

// Nanoseconds, and bytes per nanosecond. Published measurements of servers with two sockets give
// 50 to 100 ns for a cache line from another core of the socket, 150 to 250 ns from the other
// socket, and 1 to 2 us of a thread's time for each thread that it wakes.
struct Costs {
  int64_t own = 1;              // a word whose line this core has
  int64_t own_update = 8;       // a locked instruction on such a word
  int64_t socket = 70;          // a line from another core of the socket
  int64_t far = 200;            // a line from another socket
  int64_t next_reader = 10;     // between two cores that fetch the same line
  int64_t futex = 300;          // a system call that wakes nobody, or that puts its thread to sleep
  int64_t wake = 1500;          // for the waker, each thread that it wakes
  int64_t wake_latency = 5000;  // until a woken thread runs
  double node_rate = 0;         // memory bandwidth of a node; 0: memory takes no time
  double core_rate = 15;        // the most of it that one core gets
};

// What happened to the cache lines of one name, and on how many threads.
struct Line {
  int64_t reads = 0;         // fetched from another core
  int64_t writes = 0;        // plain stores
  int64_t updates = 0;       // atomic read-modify-writes
  int64_t most_updates = 0;  // of a single line
  int64_t lines = 0;         // that were touched
  int64_t broadcast = 0;     // of these, written by one thread only and read by all others
};

struct Counts {
  int64_t futex_waits = 0;  // threads that fell asleep
  int64_t futex_wakes = 0;  // system calls
  int64_t woken = 0;
  int64_t most_woken = 0;  // by one thread
  std::map<std::string, Line> lines;

  Line total() const;
};

// Makes the calling thread the first one of a machine. `nodes` has the node of each thread that the
// engine will make, the calling thread's first. Nodes are divided among `sockets`.
void start(const std::vector<int>& nodes, int sockets, const Costs& costs);
// Ends the machine. All threads must have ended but the one that started it.
void stop();

Counts take_counts();
int64_t now();           // of the calling thread, in nanoseconds
int64_t asleep();        // threads on a futex
void pause(int64_t ns);  // lets the others go on until then
void work(int64_t ns);   // keeps the calling thread's core busy
// Reads from the memory of a node, whose bandwidth its readers share.
void read_memory(int node, int64_t bytes);
int this_thread();

enum class Access { kRead, kWrite, kOrderedWrite, kUpdate };
void access(const void* word, Access kind);
void finish_writes();
bool wait_for_write(int64_t end);
void sleep_on(const void* word);
void wake(const void* word, int count);
int add_thread();
void begin_thread(int thread);
void end_thread();
void join_thread(int thread);

}  // namespace simulation

template <class T>
class Atomic {
 public:
  Atomic(T value = T()) : value_(value) { simulation::access(this, simulation::Access::kWrite); }
  Atomic(const Atomic&) = delete;
  Atomic& operator=(const Atomic&) = delete;

  T load(std::memory_order = std::memory_order_seq_cst) const {
    simulation::access(this, simulation::Access::kRead);
    return value_;
  }
  void store(T value, std::memory_order order = std::memory_order_seq_cst) {
    simulation::access(this, order == std::memory_order_seq_cst ? simulation::Access::kOrderedWrite
                                                                : simulation::Access::kWrite);
    value_ = value;
  }
  T fetch_add(T by, std::memory_order = std::memory_order_seq_cst) {
    simulation::access(this, simulation::Access::kUpdate);
    return std::exchange(value_, static_cast<T>(value_ + by));
  }
  T fetch_sub(T by, std::memory_order = std::memory_order_seq_cst) {
    return fetch_add(static_cast<T>(0 - by));
  }
  T fetch_and(T by, std::memory_order = std::memory_order_seq_cst) {
    simulation::access(this, simulation::Access::kUpdate);
    return std::exchange(value_, static_cast<T>(value_ & by));
  }

 private:
  T value_;
};

class Thread {
 public:
  template <class Function>
  explicit Thread(Function function)
      : id_(simulation::add_thread()), thread_([id = id_, function]() mutable {
          simulation::begin_thread(id);
          function();
          simulation::end_thread();
        }) {}
  void join() {
    simulation::join_thread(id_);
    thread_.join();
  }
  std::thread::native_handle_type native_handle() { return thread_.native_handle(); }

 private:
  int id_;
  std::thread thread_;
};

struct Clock {
  using duration = std::chrono::nanoseconds;
  using rep = duration::rep;
  using period = duration::period;
  using time_point = std::chrono::time_point<Clock>;
  static constexpr bool is_steady = true;
  static time_point now() { return time_point(duration(simulation::now())); }
};

inline void cpu_pause() {}
inline void full_fence() { simulation::finish_writes(); }

template <class Done>
bool spin_until(Done&& done, std::chrono::microseconds patience) {
  const int64_t end = simulation::now() + std::chrono::nanoseconds(patience).count();
  while (!done()) {
    if (!simulation::wait_for_write(end)) return done();
  }
  return true;
}

inline void futex_wait(Atomic<uint32_t>& word, uint32_t value) {
  if (word.load() == value) simulation::sleep_on(&word);
}
inline void futex_wake(Atomic<uint32_t>& word, int count) { simulation::wake(&word, count); }

void name_line(const void* line, const char* name);

}  // namespace lk

// A pool of pinned workers. The calling thread works as one of them.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "lk/topology.h"
#include "lk/wait.h"

namespace lk {

enum class Binding {
  kCpuCore,   // each worker has a CPU of its own
  kNumaNode,  // each worker may run on all CPUs of its node
};

struct PoolOptions {
  int threads = 0;  // 0: one for each physical core
  Binding binding = Binding::kCpuCore;
  bool power_saving = false;  // workers sleep at once instead of spinning first
};

struct Worker {
  int node = 0;           // index into PoolPlan::nodes
  std::vector<int> cpus;  // where it may run
};

// Which node and CPUs each worker gets. Workers are divided among nodes in proportion to the nodes'
// cores. SMT siblings get workers only when every core has one. Nodes without a worker are left
// out. Throws std::invalid_argument if there are more threads than CPUs, or if they are on more
// than kMaxNodes nodes.
struct PoolPlan {
  std::vector<Worker> workers;
  std::vector<int> nodes;         // kernel numbers of the nodes in use
  std::vector<int> node_workers;  // how many workers each has
};
PoolPlan plan_pool(const Topology& topology, const PoolOptions& options);

// A job is a function that claims pieces of work until none is left. Each worker calls it at most
// once, and nobody waits for a worker that wakes up too late. So on a machine whose cores are
// shared with other programs, a call ends when the work is done, and not when the slowest thread
// has been scheduled.
class ThreadPool {
 public:
  ThreadPool(const Topology& topology, const PoolOptions& options);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  const PoolPlan& plan() const { return plan_; }
  int size() const { return static_cast<int>(plan_.workers.size()); }

  // Calls job(worker) on the calling thread and on the workers that come in time. Returns when no
  // worker is inside. It is not reentrant, and callers take turns. `job` must not throw.
  //
  // The caller is not pinned, because threads that it creates later (OpenMP's, Python's) would
  // inherit its single core. Instead the caller becomes the worker of the core that it is on, and
  // the thread that was this worker takes the caller's former place. Otherwise both would share
  // that core, and a call of 1 ms is over before the kernel moves one of them.
  template <class Job>
  void run(Job& job) {
    run([](void* context, int worker) { (*static_cast<Job*>(context))(worker); },
        static_cast<void*>(&job));
  }

 private:
  using Function = void (*)(void*, int);

  void run(Function function, void* context);
  void work(int thread);
  void take_place(int cpu);
  void wait_for_job(uint32_t seen);

  PoolPlan plan_;
  PoolOptions options_;
  bool pinned_;
  std::vector<int> worker_of_;  // which worker each thread is; the caller is thread 0
  Function function_ = nullptr;
  void* context_ = nullptr;
  // These have cache lines of their own, because workers spin on the first while other workers
  // change the others.
  alignas(64) std::atomic<uint32_t> epoch_{0};  // counts jobs; workers sleep on this futex
  alignas(64) std::atomic<uint32_t> open_{0};   // the epoch of the job that workers may enter, or 0
  Countdown active_;                            // workers inside a job or about to read open_
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;  // threads 1, 2, ...
};

// Calls work(index, worker) for each index below `count`, on all workers.
template <class Work>
void for_each_index(ThreadPool& pool, int64_t count, Work&& work) {
  std::atomic<int64_t> next{0};
  auto job = [&](int worker) {
    for (int64_t i = next++; i < count; i = next++) work(i, worker);
  };
  pool.run(job);
}

}  // namespace lk

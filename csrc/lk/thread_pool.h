// Who runs: pinned workers that the calling thread joins as one of them.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "lk/topology.h"
#include "lk/wait.h"

namespace lk {

enum class Binding {
  kCpuCore,   // each worker on one core of its own
  kNumaNode,  // each worker on any core of its node
};

struct PoolOptions {
  int threads = 0;  // 0: one for each physical core
  Binding binding = Binding::kCpuCore;
  bool power_saving = false;  // sleep at once instead of spinning first
};

struct Worker {
  int node = 0;           // index into ThreadPool::nodes()
  std::vector<int> cpus;  // where it may run
};

// The plan of a pool: which node and CPUs each worker gets. Workers are divided among nodes in
// proportion to their cores; first one a core, then SMT siblings. Nodes without a worker are left
// out. Throws std::invalid_argument if there are more threads than CPUs, or if they are on more
// than kMaxNodes nodes.
struct PoolPlan {
  std::vector<Worker> workers;
  std::vector<int> nodes;         // kernel numbers of the nodes in use
  std::vector<int> node_workers;  // how many workers each has
};
PoolPlan plan_pool(const Topology& topology, const PoolOptions& options);

// A job is a function that claims pieces of work until none is left. Each worker calls it at most
// once, and one that wakes up too late is not waited for: on a machine whose cores are shared, a
// call ends when the work does, not when the slowest thread has been scheduled.
class ThreadPool {
 public:
  ThreadPool(const Topology& topology, const PoolOptions& options);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  const PoolPlan& plan() const { return plan_; }
  int size() const { return static_cast<int>(plan_.workers.size()); }

  // Calls job(worker) on the calling thread and on those workers that come in time; returns when no
  // worker is inside. Not reentrant; callers take turns. `job` must not throw.
  //
  // The caller is not pinned: threads that it creates later (OpenMP's, Python's) would inherit one
  // core as their whole machine. It stands in for the worker of the core that it is on, and the
  // thread that was this worker takes its place; otherwise both would share that core, and a call
  // of 1 ms is over before the kernel moves one of them.
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
  // On cache lines of their own: workers spin on the first while others count in and out.
  alignas(64) std::atomic<uint32_t> epoch_{0};  // counts jobs; the futex that workers sleep on
  alignas(64) std::atomic<uint32_t> open_{0};   // the epoch of the job that may be entered, or 0
  Countdown active_;                            // workers inside a job, or about to look
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

// A pool of pinned workers. The calling thread works as one of them.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
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
  // Nothing else needs the workers' cores between two calls, as beside a GPU. Workers then spin
  // until the next call if calls come at least every 2 ms.
  bool own_cores = false;
};

// The most workers that change the same cache lines in every call. A line passes from core to core
// in 70 ns or more, so 96 workers would begin and end a call one after the other, in 7 us. A team
// more costs the caller a line or two.
constexpr int kTeamWorkers = 16;
constexpr int kMaxTeams = 64;

// Workers of one node that share a queue of pieces and what else each of them changes in a call.
struct Team {
  int node = 0;   // index into PoolPlan::nodes
  int first = 0;  // how many workers of the node are in teams before this one
  int workers = 0;
  uint64_t of_node = 0;  // all teams of its node, a bit each
};

struct Worker {
  int node = 0;           // index into PoolPlan::nodes
  int team = 0;           // index into PoolPlan::teams
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
  std::vector<Team> teams;        // at most kMaxTeams, in the order of nodes
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
  // the thread that was this worker takes the place of worker 0, which no other thread has.
  // Otherwise both would share that core, and a call of 1 ms is over before the kernel moves one of
  // them.
  template <class Job>
  void run(Job& job) {
    run([](void* context, int worker) { (*static_cast<Job*>(context))(worker); },
        static_cast<void*>(&job));
  }

 private:
  using Function = void (*)(void*, int);

  // What the threads of a team share. They spin on the first line, which only the caller writes
  // unless they sleep, and change the second.
  struct alignas(64) Shared {
    Atomic<uint32_t> job{0};       // odd: the number of the open job; even: none is open
    Atomic<uint32_t> sleepers{0};  // on the futex `job`
    Function function = nullptr;
    void* context = nullptr;
    int place = 0;
    Countdown inside;  // threads that do the job or are about to see whether it is open
  };

  void run(Function function, void* context);
  void publish(Function function, void* context);
  void work(int thread);
  void take_place(int cpu);
  void pin(int thread);
  void learn_gap();
  uint32_t wait_for_job(Shared& team, uint32_t seen);

  PoolPlan plan_;
  PoolOptions options_;
  bool pinned_;
  int place_ = 0;  // the worker that the caller is; thread `place_` is worker 0, if not the caller
  uint32_t job_ = 0;                        // as Shared::job
  std::vector<Shared> shared_;              // for each team
  Clock::time_point last_end_;              // of a call
  std::chrono::nanoseconds gap_{0};         // between two calls, a moving average
  alignas(64) Atomic<uint32_t> idle_spin_;  // microseconds between calls; changes rarely
  Atomic<bool> stop_{false};
  std::vector<Thread> threads_;  // threads 1, 2, ...
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

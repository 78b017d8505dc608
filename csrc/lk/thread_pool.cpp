#include "lk/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <climits>
#include <stdexcept>
#include <string>
#include <utility>

#include "lk/float_mode.h"

namespace lk {
namespace {

void pin_to(pthread_t thread, const std::vector<int>& cpus) {
  // The mask is on the stack, because a call may pin threads and must not allocate. It has 8192
  // CPUs, the most that Linux supports on x86.
  cpu_set_t mask[8192 / CPU_SETSIZE] = {};
  for (int cpu : cpus) CPU_SET_S(cpu, sizeof(mask), mask);
  // This may fail if the cpuset shrank since the topology was read; the worker then runs anywhere.
  pthread_setaffinity_np(thread, sizeof(mask), mask);
}

// Divides the workers of each node evenly into teams of at most `most`.
std::vector<Team> divide_into_teams(const std::vector<int>& node_workers, int most) {
  std::vector<Team> teams;
  for (size_t node = 0; node < node_workers.size(); ++node) {
    const int workers = node_workers[node];
    const int count = (workers + most - 1) / most;
    for (int t = 0; t < count; ++t) {
      const int first = workers * t / count;
      teams.push_back({static_cast<int>(node), first, workers * (t + 1) / count - first, 0});
    }
  }
  return teams;
}

}  // namespace

PoolPlan plan_pool(const Topology& topology, const PoolOptions& options) {
  const int cores = topology.core_count();
  const int cpus = topology.cpu_count();
  const int threads = options.threads == 0 ? cores : options.threads;
  if (threads < 1 || threads > cpus) {
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", must be 1 to " +
                                std::to_string(cpus) + ", the CPUs that this process may use");
  }
  // Workers are given out one by one, each to the node that is furthest below its fair share; of
  // equal nodes, the lower one gets it.
  std::vector<int> share(topology.nodes.size(), 0);
  std::vector<int> limit(topology.nodes.size(), 0);
  for (size_t n = 0; n < topology.nodes.size(); ++n) {
    limit[n] = static_cast<int>(topology.nodes[n].cores.size());
  }
  for (int placed = 0; placed < threads; ++placed) {
    if (placed == cores) {  // every core has a worker, so SMT siblings come next
      for (size_t n = 0; n < topology.nodes.size(); ++n) {
        limit[n] = 0;
        for (const Core& core : topology.nodes[n].cores) {
          limit[n] += static_cast<int>(core.cpus.size());
        }
      }
    }
    int best = -1;
    for (int n = 0; n < static_cast<int>(limit.size()); ++n) {
      if (share[n] >= limit[n]) continue;
      if (best < 0 || int64_t{share[n]} * limit[best] < int64_t{share[best]} * limit[n]) best = n;
    }
    ++share[best];
  }

  PoolPlan plan;
  for (size_t n = 0; n < topology.nodes.size(); ++n) {
    if (share[n] == 0) continue;
    const Node& node = topology.nodes[n];
    std::vector<int> whole_node;
    std::vector<int> order;  // the first CPUs of all cores, then their siblings
    for (const Core& core : node.cores) {
      whole_node.insert(whole_node.end(), core.cpus.begin(), core.cpus.end());
    }
    for (size_t sibling = 0; order.size() < whole_node.size(); ++sibling) {
      for (const Core& core : node.cores) {
        if (sibling < core.cpus.size()) order.push_back(core.cpus[sibling]);
      }
    }
    for (int w = 0; w < share[n]; ++w) {
      plan.workers.push_back(
          {static_cast<int>(plan.nodes.size()), 0,
           options.binding == Binding::kCpuCore ? std::vector<int>{order[w]} : whole_node});
    }
    plan.nodes.push_back(node.id);
    plan.node_workers.push_back(share[n]);
  }
  if (plan.nodes.size() > kMaxNodes) {
    throw std::invalid_argument("the " + std::to_string(threads) + " threads are on " +
                                std::to_string(plan.nodes.size()) +
                                " NUMA nodes, must be on 1 to " + std::to_string(kMaxNodes) +
                                ": give the engine fewer threads or the CPUs of fewer nodes");
  }
  // There are at most as many nodes as teams, so this ends with whole nodes at the latest.
  int most = kTeamWorkers;
  do {
    plan.teams = divide_into_teams(plan.node_workers, most);
    most *= 2;
  } while (plan.teams.size() > kMaxTeams);
  size_t worker = 0;
  for (size_t t = 0; t < plan.teams.size(); ++t) {
    Team& team = plan.teams[t];
    for (int w = 0; w < team.workers; ++w) plan.workers[worker++].team = static_cast<int>(t);
    for (size_t other = 0; other < plan.teams.size(); ++other) {
      if (plan.teams[other].node == team.node) team.of_node |= uint64_t{1} << other;
    }
  }
  return plan;
}

ThreadPool::ThreadPool(const Topology& topology, const PoolOptions& options)
    : plan_(plan_pool(topology, options)),
      options_(options),
      pinned_(!topology.synthetic),
      shared_(plan_.teams.size()),
      last_end_(Clock::now() - 2 * kLongestIdleSpin),  // so that the first gap counts as long
      idle_spin_(options.power_saving ? 0 : static_cast<uint32_t>(kIdleSpin.count())) {
  name_line(&idle_spin_, "idle spin");
  for (Shared& team : shared_) {
    name_line(&team.job, "job");
    name_line(&team.inside, "inside");
  }
  for (int thread = 1; thread < size(); ++thread) {
    threads_.emplace_back([this, thread] {
      const std::string name = "lk-" + std::to_string(thread);
      pthread_setname_np(pthread_self(), name.c_str());
      work(thread);
    });
    if (pinned_) pin(thread);
  }
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  publish(nullptr, nullptr);
  for (Shared& team : shared_) futex_wake(team.job, INT_MAX);
  for (Thread& thread : threads_) thread.join();
}

void ThreadPool::pin(int thread) {
  const int worker = thread == place_ ? 0 : thread;
  pin_to(threads_[thread - 1].native_handle(), plan_.workers[worker].cpus);
}

// Makes the caller, which is on `cpu`, the worker of that CPU.
void ThreadPool::take_place(int cpu) {
  const auto runs_here = [&](int worker) {
    const std::vector<int>& cpus = plan_.workers[worker].cpus;
    return std::find(cpus.begin(), cpus.end(), cpu) != cpus.end();
  };
  if (runs_here(place_)) return;
  for (int worker = 0; worker < size(); ++worker) {
    if (!runs_here(worker)) continue;
    // The thread of the caller's former place gets it back. So one thread at most is away from the
    // neighbours with which it shares cache lines.
    const int before = std::exchange(place_, worker);
    if (before != 0) pin(before);
    if (place_ != 0) pin(place_);
    return;
  }
}

// Opens the next job, or closes the open one.
void ThreadPool::publish(Function function, void* context) {
  ++job_;
  for (Shared& team : shared_) {
    if (function != nullptr) {
      team.function = function;
      team.context = context;
      team.place = place_;
    }
    team.job.store(job_, std::memory_order_release);
  }
  full_fence();
}

// Lets workers spin for four times the average time between calls, because these times vary. Times
// over the limit count as 0: it would not pay to spin through them.
void ThreadPool::learn_gap() {
  const std::chrono::nanoseconds gap = Clock::now() - last_end_;
  const auto known = gap > kLongestIdleSpin ? std::chrono::nanoseconds(0) : gap;
  gap_ = gap_.count() == 0 ? known : gap_ + (known - gap_) / 8;
  const int64_t wanted =
      std::clamp<int64_t>(4 * gap_.count() / 1000, kIdleSpin.count(), kLongestIdleSpin.count());
  // The workers' copies of this line stay valid until the limit is much too low or too high.
  const int64_t spin = idle_spin_.load(std::memory_order_relaxed);
  if (wanted > spin || wanted < spin / 2) {
    idle_spin_.store(static_cast<uint32_t>(wanted), std::memory_order_relaxed);
  }
}

void ThreadPool::run(Function function, void* context) {
  const ExactFloats exact;
  if (threads_.empty()) {
    function(context, 0);
    return;
  }
  if (pinned_) take_place(sched_getcpu());
  const bool learns = options_.own_cores && !options_.power_saving;
  if (learns) learn_gap();
  publish(function, context);
  // The caller wakes one thread of each team, and a thread that wakes up wakes two more. To wake
  // 191 threads takes a single thread 200 to 400 us.
  for (Shared& team : shared_) {
    if (team.sleepers.load(std::memory_order_relaxed) != 0) futex_wake(team.job, 1);
  }

  function(context, place_);

  // A worker adds itself to `inside` before it reads whether the job is open. Here the job is
  // closed before `inside` is read. The fence and the worker's operations have a single order, so
  // one of the two threads sees what the other did.
  publish(nullptr, nullptr);
  for (Shared& team : shared_) team.inside.wait();
  if (learns) last_end_ = Clock::now();
}

// Returns the number of an open job other than `seen`.
uint32_t ThreadPool::wait_for_job(Shared& team, uint32_t seen) {
  uint32_t job = 0;
  const auto opened = [&] {
    job = team.job.load(std::memory_order_acquire);
    return job % 2 == 1 && job != seen;
  };
  const uint32_t spin = idle_spin_.load(std::memory_order_relaxed);
  if (spin != 0 && spin_until(opened, std::chrono::microseconds(spin))) return job;
  // The thread adds itself to sleepers before it reads the job again, and the caller opens the job
  // before it reads sleepers.
  team.sleepers.fetch_add(1);
  while (job = team.job.load(), job % 2 == 0 || job == seen) futex_wait(team.job, job);
  // Those that still sleep were woken neither by the caller nor by another thread.
  if (team.sleepers.fetch_sub(1) > 1) futex_wake(team.job, 2);
  return job;
}

void ThreadPool::work(int thread) {
  const ExactFloats exact;
  Shared& team = shared_[plan_.workers[thread].team];
  uint32_t seen = 0;
  while (true) {
    seen = wait_for_job(team, seen);
    if (stop_.load()) return;
    team.inside.add(1);
    if (team.job.load() == seen) {
      team.function(team.context, team.place == thread ? 0 : thread);
    }
    team.inside.subtract(1);
  }
}

}  // namespace lk

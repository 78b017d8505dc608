#include "lk/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace lk {
namespace {

void pin(pthread_t thread, const std::vector<int>& cpus) {
  // The mask is on the stack, because a call may pin threads and must not allocate. It has 8192
  // CPUs, the most that Linux supports on x86.
  cpu_set_t mask[8192 / CPU_SETSIZE] = {};
  for (int cpu : cpus) CPU_SET_S(cpu, sizeof(mask), mask);
  // This may fail if the cpuset shrank since the topology was read; the worker then runs anywhere.
  pthread_setaffinity_np(thread, sizeof(mask), mask);
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
          {static_cast<int>(plan.nodes.size()),
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
  return plan;
}

ThreadPool::ThreadPool(const Topology& topology, const PoolOptions& options)
    : plan_(plan_pool(topology, options)), options_(options), pinned_(!topology.synthetic) {
  for (int thread = 0; thread < size(); ++thread) worker_of_.push_back(thread);
  for (int thread = 1; thread < size(); ++thread) {
    threads_.emplace_back([this, thread] {
      const std::string name = "lk-" + std::to_string(thread);
      pthread_setname_np(pthread_self(), name.c_str());
      work(thread);
    });
    if (pinned_) pin(threads_.back().native_handle(), plan_.workers[thread].cpus);
  }
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  epoch_.fetch_add(1);
  futex_wake_all(epoch_);
  for (std::thread& thread : threads_) thread.join();
}

// Makes the caller, which is on `cpu`, the worker of that CPU.
void ThreadPool::take_place(int cpu) {
  const auto runs_here = [&](int worker) {
    const std::vector<int>& cpus = plan_.workers[worker].cpus;
    return std::find(cpus.begin(), cpus.end(), cpu) != cpus.end();
  };
  if (runs_here(worker_of_[0])) return;
  for (int thread = 1; thread < size(); ++thread) {
    if (!runs_here(worker_of_[thread])) continue;
    std::swap(worker_of_[0], worker_of_[thread]);
    pin(threads_[thread - 1].native_handle(), plan_.workers[worker_of_[thread]].cpus);
    return;
  }
}

void ThreadPool::run(Function function, void* context) {
  if (threads_.empty()) {
    function(context, 0);
    return;
  }
  if (pinned_) take_place(sched_getcpu());
  function_ = function;
  context_ = context;
  // In open_, 0 means that no job is open, so the counter skips 0 when it wraps.
  uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
  if (epoch == 0) epoch = 1;
  open_.store(epoch);
  epoch_.store(epoch);
  if (sleepers_.load() != 0) futex_wake_all(epoch_);

  function(context, worker_of_[0]);

  // A worker adds itself to active_ before it reads whether the job is open. Here the job is closed
  // before active_ is read. All these operations have a single order, so one of the two threads
  // sees what the other did.
  open_.store(0);
  active_.wait();
}

void ThreadPool::wait_for_job(uint32_t seen) {
  const auto changed = [&] { return epoch_.load(std::memory_order_relaxed) != seen; };
  if (!options_.power_saving && spin_until(changed, kIdleSpin)) return;
  sleepers_.fetch_add(1);
  while (epoch_.load() == seen) futex_wait(epoch_, seen);
  sleepers_.fetch_sub(1);
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  while (true) {
    wait_for_job(seen);
    seen = epoch_.load();
    if (stop_.load()) return;
    active_.add(1);
    if (open_.load() == seen) function_(context_, worker_of_[thread]);
    active_.subtract(1);
  }
}

}  // namespace lk

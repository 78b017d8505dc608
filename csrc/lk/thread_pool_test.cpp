#include "lk/thread_pool.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <time.h>

#include <atomic>
#include <set>

#include "lk/rows.h"

namespace lk {
namespace {

std::vector<int> nodes_of(const PoolPlan& plan) {
  std::vector<int> nodes;
  for (const Worker& worker : plan.workers) nodes.push_back(plan.nodes[worker.node]);
  return nodes;
}

TEST(PlanPool, OneWorkerACoreByDefault) {
  const PoolPlan plan = plan_pool(parse_topology("2 nodes x 2 cores x 2 threads"), {});
  EXPECT_EQ(nodes_of(plan), (std::vector<int>{0, 0, 1, 1}));
  std::set<int> cpus;
  for (const Worker& worker : plan.workers) cpus.insert(worker.cpus.at(0));
  EXPECT_EQ(cpus, (std::set<int>{0, 2, 4, 6}));  // the first sibling of each core
}

TEST(PlanPool, SharesFollowTheCores) {
  PoolOptions options;
  options.threads = 4;
  const PoolPlan plan = plan_pool(parse_topology("2 nodes x 6,2 cores x 1 threads"), options);
  EXPECT_EQ(plan.node_workers, (std::vector<int>{3, 1}));
}

TEST(PlanPool, SiblingsOnlyWhenEveryCoreHasAWorker) {
  PoolOptions options;
  options.threads = 6;
  const PoolPlan plan = plan_pool(parse_topology("2 nodes x 2,3 cores x 2 threads"), options);
  std::set<int> cpus;
  for (const Worker& worker : plan.workers) cpus.insert(worker.cpus.at(0));
  EXPECT_EQ(cpus.size(), 6u);
  for (int first_sibling : {0, 2, 4, 6, 8}) EXPECT_TRUE(cpus.count(first_sibling));
}

TEST(PlanPool, NodesWithoutWorkersAreLeftOut) {
  PoolOptions options;
  options.threads = 1;
  const PoolPlan plan = plan_pool(parse_topology("3 nodes x 0,1,1 cores x 1 threads"), options);
  EXPECT_EQ(plan.nodes, (std::vector<int>{1}));
  EXPECT_EQ(plan.workers.at(0).node, 0);
}

TEST(PlanPool, NodeBindingGivesTheWholeNode) {
  PoolOptions options;
  options.binding = Binding::kNumaNode;
  const PoolPlan plan = plan_pool(parse_topology("1 node x 2 cores x 2 threads"), options);
  for (const Worker& worker : plan.workers) EXPECT_EQ(worker.cpus, (std::vector<int>{0, 1, 2, 3}));
}

TEST(PlanPool, NeverMoreThreadsThanCpus) {
  PoolOptions options;
  for (int threads : {-1, 5}) {
    options.threads = threads;
    EXPECT_THROW(plan_pool(parse_topology("2 nodes x 1 cores x 2 threads"), options),
                 std::invalid_argument);
  }
}

TEST(DivideRows, CoversAllRowsInProportion) {
  EXPECT_EQ(divide_rows(100, {1}), (std::vector<int64_t>{0, 100}));
  EXPECT_EQ(divide_rows(100, {3, 1}), (std::vector<int64_t>{0, 75, 100}));
  EXPECT_EQ(divide_rows(2, {1, 1, 1, 1}), (std::vector<int64_t>{0, 0, 1, 1, 2}));
  EXPECT_EQ(divide_rows(0, {2, 2}), (std::vector<int64_t>{0, 0, 0}));
}

class Pool : public testing::TestWithParam<std::tuple<int, bool>> {};

// Every piece is done once, whoever comes, over many jobs in quick succession and after pauses.
TEST_P(Pool, DoesEveryPieceOnce) {
  const auto [threads, power_saving] = GetParam();
  PoolOptions options;
  options.threads = threads;
  options.power_saving = power_saving;
  ThreadPool pool(parse_topology("1 node x 16 cores x 1 threads"), options);
  for (int round = 0; round < 300; ++round) {
    std::atomic<int> next{0};
    std::vector<int> done(57, 0);
    std::vector<std::atomic<int>> calls(threads);
    auto job = [&](int worker) {
      ++calls[worker];
      for (int i = next++; i < 57; i = next++) ++done[i];
    };
    pool.run(job);
    EXPECT_EQ(done, std::vector<int>(57, 1));
    EXPECT_EQ(calls[0], 1);
    for (const auto& count : calls) EXPECT_LE(count, 1);
    if (round % 100 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, Pool,
                         testing::Combine(testing::Values(1, 2, 5, 16), testing::Bool()));

TEST(ThreadPool, StartsAndStopsWithoutAJob) {
  for (int i = 0; i < 50; ++i) ThreadPool(parse_topology("1 node x 4 cores x 1 threads"), {});
}

double cpu_seconds() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

TEST(ThreadPool, IdleWorkersSleep) {
  ThreadPool pool(parse_topology("1 node x 4 cores x 1 threads"), {});
  auto job = [](int) {};
  pool.run(job);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_LT(cpu_seconds() - before, 0.003);
}

TEST(ThreadPool, CallerAndWorkersNeverShareACpu) {
  const std::vector<int> cpus = allowed_cpus();
  ThreadPool pool(detect_topology("/sys", cpus), {});
  for (int cpu : cpus) {
    // A thread that sits on each CPU in turn calls.
    std::vector<int> where;
    std::thread caller([&] {
      cpu_set_t mask;
      CPU_ZERO(&mask);
      CPU_SET(cpu, &mask);
      sched_setaffinity(0, sizeof(mask), &mask);
      std::vector<int> seen(pool.size(), -1);
      std::atomic<int> arrived{0};
      auto job = [&](int worker) {
        seen[worker] = sched_getcpu();
        ++arrived;
        for (Backoff backoff; arrived < pool.size();) backoff.pause();
      };
      pool.run(job);
      where = seen;
    });
    caller.join();
    EXPECT_EQ(std::set<int>(where.begin(), where.end()).size(), where.size());
    for (int worker = 0; worker < pool.size(); ++worker) {
      // The caller may sit on an SMT sibling, which no worker has.
      EXPECT_TRUE(where[worker] == cpu || where[worker] == pool.plan().workers[worker].cpus.at(0));
    }
  }
}

}  // namespace
}  // namespace lk

#include "lk/thread_pool.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <numeric>
#include <set>
#include <utility>

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

TEST(PlanPool, TeamsAreOfOneNodeAndEven) {
  const PoolPlan plan = plan_pool(parse_topology("3 nodes x 40,24,5 cores x 1 threads"), {});
  std::vector<std::pair<int, int>> teams;  // node and workers
  for (const Team& team : plan.teams) teams.push_back({team.node, team.workers});
  EXPECT_EQ(teams, (std::vector<std::pair<int, int>>{
                       {0, 13}, {0, 13}, {0, 14}, {1, 12}, {1, 12}, {2, 5}}));
  EXPECT_EQ(plan.teams[1].of_node, 0b000111u);
  EXPECT_EQ(plan.teams[4].of_node, 0b011000u);
  EXPECT_EQ(plan.teams[5].of_node, 0b100000u);
}

// Machines of all kinds, and how many workers each node gets by default: one for each core.
struct Machine {
  const char* name;
  Topology topology;
  std::vector<int> nodes;         // kernel numbers of those with a core
  std::vector<int> node_workers;  // of those
};

void PrintTo(const Machine& machine, std::ostream* out) { *out << machine.name; }

std::vector<int> count_up(int end, int begin = 0) {
  std::vector<int> values(end - begin);
  std::iota(values.begin(), values.end(), begin);
  return values;
}

// Each worker is in one team, a team is of one node, and those of a node have all its workers.
void expect_teams(const PoolPlan& plan) {
  ASSERT_LE(plan.teams.size(), static_cast<size_t>(kMaxTeams));
  size_t worker = 0;
  std::vector<int> of_node(plan.nodes.size(), 0);
  for (size_t t = 0; t < plan.teams.size(); ++t) {
    const Team& team = plan.teams[t];
    EXPECT_GE(team.workers, 1);
    EXPECT_EQ(team.first, of_node[team.node]);
    of_node[team.node] += team.workers;
    for (int w = 0; w < team.workers; ++w, ++worker) {
      EXPECT_EQ(plan.workers.at(worker).team, static_cast<int>(t));
      EXPECT_EQ(plan.workers[worker].node, team.node);
    }
  }
  EXPECT_EQ(worker, plan.workers.size());
  EXPECT_EQ(of_node, plan.node_workers);
}

class Machines : public testing::TestWithParam<Machine> {};

TEST_P(Machines, AWorkerACoreAndNeverTwoOnOne) {
  const Machine& machine = GetParam();
  const PoolPlan plan = plan_pool(machine.topology, {});
  EXPECT_EQ(plan.nodes, machine.nodes);
  EXPECT_EQ(plan.node_workers, machine.node_workers);
  EXPECT_EQ(static_cast<int>(plan.workers.size()), machine.topology.core_count());
  std::set<int> cpus;
  for (const Worker& worker : plan.workers) {
    ASSERT_EQ(worker.cpus.size(), 1u);
    cpus.insert(worker.cpus[0]);
  }
  for (const Node& node : machine.topology.nodes) {
    for (const Core& core : node.cores) {
      EXPECT_EQ(cpus.count(core.cpus[0]), 1u);
      for (size_t sibling = 1; sibling < core.cpus.size(); ++sibling) {
        EXPECT_EQ(cpus.count(core.cpus[sibling]), 0u);
      }
    }
  }
}

TEST_P(Machines, AnyNumberOfThreadsIsDividedInProportion) {
  const Topology& topology = GetParam().topology;
  const int cores = topology.core_count();
  for (int threads = 1; threads <= topology.cpu_count(); ++threads) {
    PoolOptions options;
    options.threads = threads;
    const PoolPlan plan = plan_pool(topology, options);
    ASSERT_EQ(static_cast<int>(plan.workers.size()), threads);
    std::set<int> cpus;
    for (const Worker& worker : plan.workers) cpus.insert(worker.cpus.at(0));
    EXPECT_EQ(static_cast<int>(cpus.size()), threads);  // a CPU each
    expect_teams(plan);
    if (threads > cores) continue;
    for (size_t i = 0; i < plan.nodes.size(); ++i) {
      const auto node = std::find_if(topology.nodes.begin(), topology.nodes.end(),
                                     [&](const Node& n) { return n.id == plan.nodes[i]; });
      const int node_cores = static_cast<int>(node->cores.size());
      EXPECT_LE(plan.node_workers[i], node_cores);
      // A share is rounded up at most. It is rounded down by more than 1 only where other nodes
      // were rounded up to 1.
      EXPECT_LE((plan.node_workers[i] - 1) * cores, threads * node_cores);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, Machines,
    testing::Values(
        Machine{"one node", parse_topology("1 node x 6 cores x 2 threads"), {0}, {6}},
        Machine{"two sockets", parse_topology("2 nodes x 24 cores x 2 threads"), {0, 1}, {24, 24}},
        Machine{"four uneven nodes",
                parse_topology("4 nodes x 8,4,7,1 cores x 1 threads"),
                {0, 1, 2, 3},
                {8, 4, 7, 1}},
        Machine{"eight nodes", parse_topology("8 nodes x 6 cores x 2 threads"), count_up(8),
                std::vector<int>(8, 6)},
        Machine{"32 nodes", parse_topology("32 nodes x 2 cores x 1 threads"), count_up(32),
                std::vector<int>(32, 2)},
        Machine{"more workers than 64 teams of 16",
                parse_topology("64 nodes x 17 cores x 1 threads"), count_up(64),
                std::vector<int>(64, 17)},
        Machine{"memory-only nodes",
                parse_topology("4 nodes x 4,0,2,0 cores x 2 threads"),
                {0, 2},
                {4, 2}},
        // CPUs 0-7 are on node 0 and 8-15 on node 1; core 1 has only its second thread left.
        Machine{"cpuset without some cores",
                restrict_topology(parse_topology("2 nodes x 4 cores x 2 threads"),
                                  {0, 1, 3, 8, 9, 10, 11, 15}),
                {0, 1},
                {2, 3}},
        Machine{"cpuset without a node",
                restrict_topology(parse_topology("2 nodes x 4 cores x 2 threads"), count_up(16, 8)),
                {1},
                {4}},
        Machine{"no NUMA information", detect_topology("/nonexistent", count_up(6)), {0}, {6}}));

TEST(DivideRows, WholeTilesInProportion) {
  EXPECT_EQ(divide_rows(100, {1}), (std::vector<int64_t>{0, 100}));
  EXPECT_EQ(divide_rows(256, {3, 1}), (std::vector<int64_t>{0, 192, 256}));
  // There are fewer tiles than nodes, and the last tile has one row.
  EXPECT_EQ(divide_rows(65, {1, 1, 1, 1}), (std::vector<int64_t>{0, 0, 64, 64, 65}));
  EXPECT_EQ(divide_rows(63, {2, 2}), (std::vector<int64_t>{0, 0, 63}));
  EXPECT_EQ(divide_rows(0, {2, 2}), (std::vector<int64_t>{0, 0, 0}));
}

TEST(DivideRows, LessThanATileFromTheExactShare) {
  const std::vector<std::vector<int>> machines{{5},
                                               {4, 4},
                                               {6, 2},
                                               {3, 3, 3},
                                               {7, 1, 4, 4},
                                               std::vector<int>(8, 24),
                                               std::vector<int>(32, 3)};
  for (const std::vector<int>& workers : machines) {
    const int64_t all = std::accumulate(workers.begin(), workers.end(), int64_t{0});
    for (int64_t rows : {1, 64, 704, 768, 1408, 2048, 2880, 7168, 7169}) {
      const std::vector<int64_t> bounds = divide_rows(rows, workers);
      ASSERT_EQ(bounds.size(), workers.size() + 1);
      EXPECT_EQ(bounds.front(), 0);
      EXPECT_EQ(bounds.back(), rows);
      const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
      for (size_t node = 0; node < workers.size(); ++node) {
        const int64_t begin = bounds[node];
        const int64_t end = bounds[node + 1];
        EXPECT_TRUE(begin % kTileRows == 0 || begin == rows);
        const int64_t share = (end - begin + kTileRows - 1) / kTileRows;
        EXPECT_LT(std::abs(share * all - tiles * workers[node]), all)
            << rows << " rows on node " << node << " of " << workers.size();
      }
    }
  }
}

class Pool : public testing::TestWithParam<std::tuple<const char*, bool, bool>> {};

// Every piece is done once, whichever workers come, in many jobs in quick succession and after
// pauses.
TEST_P(Pool, DoesEveryPieceOnce) {
  const auto [topology, power_saving, own_cores] = GetParam();
  PoolOptions options;
  options.power_saving = power_saving;
  options.own_cores = own_cores;
  ThreadPool pool(parse_topology(topology), options);
  const int threads = pool.size();
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
                         testing::Combine(testing::Values("1 node x 1 cores x 1 threads",
                                                          "1 node x 2 cores x 1 threads",
                                                          "1 node x 5 cores x 1 threads",
                                                          "1 node x 16 cores x 1 threads",
                                                          "2 nodes x 17,2 cores x 1 threads"),
                                          testing::Bool(), testing::Bool()));

TEST(ThreadPool, StartsAndStopsWithoutAJob) {
  for (int i = 0; i < 50; ++i) ThreadPool(parse_topology("1 node x 4 cores x 1 threads"), {});
}

double cpu_seconds() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

// From 100 ms after the last job on, the workers take at most 1% of the CPU time of a core.
TEST(ThreadPool, IdleWorkersSleep) {
  for (const auto& [power_saving, own_cores] :
       {std::pair{false, false}, std::pair{true, false}, std::pair{false, true}}) {
    PoolOptions options;
    options.power_saving = power_saving;
    options.own_cores = own_cores;
    ThreadPool pool(parse_topology("1 node x 4 cores x 1 threads"), options);
    auto job = [](int) {};
    for (int call = 0; call < 100; ++call) pool.run(job);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    const double before = cpu_seconds();
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    EXPECT_LT(cpu_seconds() - before, 0.003);
  }
}

TEST(ThreadPool, CallerAndWorkersNeverShareACpu) {
  const std::vector<int> cpus = allowed_cpus();
  ThreadPool pool(detect_topology("/sys", cpus), {});
  for (int cpu : cpus) {
    // The calling thread is on each CPU in turn.
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
        while (arrived < pool.size()) std::this_thread::yield();
      };
      pool.run(job);
      where = seen;
    });
    caller.join();
    EXPECT_EQ(std::set<int>(where.begin(), where.end()).size(), where.size());
    for (int worker = 0; worker < pool.size(); ++worker) {
      // The caller may be on an SMT sibling, which no worker has.
      EXPECT_TRUE(where[worker] == cpu || where[worker] == pool.plan().workers[worker].cpus.at(0));
    }
  }
}

}  // namespace
}  // namespace lk

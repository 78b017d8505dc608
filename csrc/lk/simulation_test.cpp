// What a call does on machines with up to 192 cores, counted on simulated ones.
#include "lk/testing/simulation.h"

#include <gtest/gtest.h>

#include <string>

#include "lk/phase.h"
#include "lk/testing/simulated_calls.h"

namespace lk::simulation {
namespace {

TEST(Simulation, ALineTakesItsTimeBetweenCores) {
  const Costs costs;
  start({0, 0, 1}, 2, costs);
  {
    Atomic<uint32_t> word{0};
    int64_t begin = now();
    word.fetch_add(1);
    EXPECT_EQ(now() - begin, costs.own_update);
    int64_t near = 0, far = 0, again = 0;
    Thread neighbour([&] {
      const int64_t begin = now();
      word.load();
      near = now() - begin;
    });
    neighbour.join();
    Thread other_socket([&] {
      int64_t begin = now();
      word.fetch_add(1);
      far = now() - begin;
      begin = now();
      word.load();
      again = now() - begin;
    });
    other_socket.join();
    EXPECT_EQ(near, costs.socket);
    EXPECT_EQ(far, costs.far);
    EXPECT_EQ(again, costs.own);
    name_line(&word, "word");
    const Counts counts = take_counts();
    const Line& line = counts.lines.at("word");
    EXPECT_EQ(line.updates, 2);
    EXPECT_EQ(line.reads, 1);
    EXPECT_EQ(line.broadcast, 0);
  }
  stop();
}

TEST(Simulation, UpdatesOfALineFollowEachOther) {
  constexpr int kThreads = 9;
  const Costs costs;
  start(std::vector<int>(kThreads, 0), 1, costs);
  {
    Atomic<uint32_t> word{0};
    const int64_t begin = now();
    std::vector<Thread> threads;
    for (int t = 1; t < kThreads; ++t) threads.emplace_back([&] { word.fetch_add(1); });
    for (Thread& thread : threads) thread.join();
    EXPECT_EQ(now() - begin, (kThreads - 1) * costs.socket);
    EXPECT_EQ(word.load(), kThreads - 1u);
  }
  stop();
}

TEST(Simulation, ReadersShareTheBandwidthOfANode) {
  Costs costs;
  costs.node_rate = 10;
  costs.core_rate = 5;
  start({0, 0, 0, 0, 0}, 1, costs);
  {
    const int64_t begin = now();
    std::vector<Thread> threads;
    for (int t = 1; t <= 4; ++t)
      threads.emplace_back([t] { read_memory(0, t == 4 ? 4000 : 1000); });
    for (Thread& thread : threads) thread.join();
    // Four readers get 2.5 bytes per ns each until three of them are done, and the last one gets 5.
    EXPECT_NEAR(now() - begin, 400 + 600, 8);
  }
  stop();
}

TEST(Simulation, AWakerPaysForEachThread) {
  const Costs costs;
  start({0, 0, 0, 0}, 1, costs);
  {
    Atomic<uint32_t> word{0};
    std::vector<Thread> threads;
    for (int t = 1; t < 4; ++t) {
      threads.emplace_back([&] {
        while (word.load() == 0) futex_wait(word, 0);
      });
    }
    pause(100'000);
    EXPECT_EQ(asleep(), 3);
    word.store(1);
    const int64_t begin = now();
    futex_wake(word, 2);
    EXPECT_EQ(now() - begin, costs.futex + 2 * costs.wake);
    futex_wake(word, 2);
    for (Thread& thread : threads) thread.join();
    const Counts counts = take_counts();
    EXPECT_EQ(counts.futex_waits, 3);
    EXPECT_EQ(counts.futex_wakes, 2);
    EXPECT_EQ(counts.woken, 3);
    EXPECT_EQ(counts.most_woken, 3);
  }
  stop();
}

TEST(Simulation, SpinningEndsAtAWriteOrInTime) {
  start({0, 0}, 1, {});
  {
    Atomic<uint32_t> word{0};
    bool early = true, late = false;
    Thread spinning([&] {
      const auto written = [&] { return word.load() == 1; };
      early = spin_until(written, std::chrono::microseconds(3));
      late = spin_until(written, std::chrono::microseconds(3));
    });
    pause(5000);
    word.store(1);
    spinning.join();
    EXPECT_FALSE(early);
    EXPECT_TRUE(late);
    EXPECT_LT(now(), 5500);
  }
  stop();
}

// DeepSeek-V3's experts in int4 on machines with 6 to 192 cores, reading at 391 GB/s a socket.
Calls calls_on(const std::string& topology, int64_t tokens = 1) {
  Calls calls;
  calls.topology = topology;
  calls.sockets = topology[0] == '1' && topology[1] == ' ' ? 1 : 2;
  calls.machine_rate = calls.sockets * 391;
  calls.tokens = tokens;
  return calls;
}

class Machines : public testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(
    Kinds, Machines,
    testing::Values("1 node x 6 cores x 1 threads", "1 node x 16 cores x 1 threads",
                    "2 nodes x 24 cores x 1 threads", "4 nodes x 7,24,16,1 cores x 1 threads",
                    "2 nodes x 96 cores x 1 threads", "8 nodes x 24 cores x 1 threads",
                    "12 nodes x 16 cores x 1 threads"));

TEST_P(Machines, HaveTheSameCountsInEachRun) {
  Calls calls = calls_on(GetParam());
  calls.gaps = {20'000, 300'000};
  const Result one = simulate(calls), other = simulate(calls);
  for (size_t call = 0; call < 3; ++call) {
    EXPECT_EQ(one.calls[call].ns, other.calls[call].ns);
    const Line first = one.calls[call].counts.total(), second = other.calls[call].counts.total();
    EXPECT_EQ(first.updates, second.updates);
    EXPECT_EQ(first.reads, second.reads);
  }
}

// While workers spin, a call makes no system call. Each worker enters and leaves the job once. A
// cache line that workers change belongs to a team, and one that all look at changes once or twice
// for each team.
TEST_P(Machines, ChangeNoLineOnceForEachWorker) {
  for (int64_t tokens : {1, 16}) {
    Calls calls = calls_on(GetParam(), tokens);
    calls.gaps = {20'000, 20'000, 20'000};
    const Result result = simulate(calls);
    const PoolPlan plan = plan_pool(parse_topology(GetParam()), {});
    const auto teams = static_cast<int64_t>(plan.teams.size());
    for (size_t number = 1; number < result.calls.size(); ++number) {
      const Call& call = result.calls[number];
      EXPECT_EQ(call.counts.futex_waits, 0);
      EXPECT_EQ(call.counts.futex_wakes, 0);
      const auto line = [&](const char* name) { return call.counts.lines.at(name); };
      EXPECT_EQ(line("inside").updates, 2 * (result.workers - 1));
      EXPECT_LE(line("inside").most_updates, 2 * kTeamWorkers);
      for (const char* phase : {"pack", "gate_up", "down"}) {
        EXPECT_LE(line(phase).updates, 2 * teams) << phase;
      }
      EXPECT_LE(line("open queues").most_updates, teams);
      EXPECT_EQ(line("job").writes, 2 * teams);
      // A piece is claimed once. Each worker also fails once for each queue that it looks at, and
      // says once that its pieces are done.
      const int64_t pieces = tokens + call.tiles + tokens * calls.hidden / 64;
      EXPECT_LE(line("queue").updates, pieces + 4 * 4 * result.workers);
    }
  }
}

// Where nodes have equal work, next to nothing is read from another node's memory.
TEST(EqualNodes, ReadTheirOwnMemory) {
  for (const char* topology : {"2 nodes x 24 cores x 1 threads", "2 nodes x 96 cores x 1 threads",
                               "8 nodes x 24 cores x 1 threads"}) {
    Calls calls = calls_on(topology);
    calls.hidden = 6144;  // the tiles of both matrices are a multiple of the nodes
    calls.intermediate = 3072;
    calls.gaps = {20'000, 20'000};
    for (const Call& call : simulate(calls).calls) EXPECT_LE(call.stolen, call.tiles / 20);
  }
}

// The caller wakes one thread of each team, and no thread wakes more than two others.
TEST_P(Machines, WakeUpAsATree) {
  Calls calls = calls_on(GetParam());
  calls.gaps = {300'000, 300'000};
  const Result result = simulate(calls);
  const PoolPlan plan = plan_pool(parse_topology(GetParam()), {});
  const Counts& counts = result.calls.back().counts;
  EXPECT_EQ(counts.futex_waits, result.workers - 1);
  EXPECT_EQ(counts.woken, result.workers - 1);
  EXPECT_LE(counts.most_woken, std::max<int64_t>(plan.teams.size(), 2));
}

// Beside a GPU, workers spin through gaps that are longer than the 50 us after which they sleep
// elsewhere, from the third call on: the second shows how long the gaps are.
TEST_P(Machines, SpinThroughTheGapsBesideAGpu) {
  for (int64_t gap : {60'000, 300'000, 1'500'000}) {
    Calls calls = calls_on(GetParam());
    calls.pool.own_cores = true;
    calls.gaps = {gap, gap, gap + gap / 5, gap / 3, gap};
    calls.idle = 2'100'000;
    const Result result = simulate(calls);
    for (size_t number = 2; number < result.calls.size(); ++number) {
      EXPECT_EQ(result.calls[number].counts.futex_waits, 0) << gap << " " << number;
      EXPECT_EQ(result.calls[number].counts.futex_wakes, 0) << gap << " " << number;
    }
    // An idle server's workers sleep after 2 ms at the latest, each once.
    EXPECT_EQ(result.asleep, result.workers - 1);
    EXPECT_EQ(result.after.futex_waits, result.workers - 1);
  }
}

TEST(BesideAGpu, WorkersSpinThroughStepsWithAPauseInBetween) {
  Calls calls = calls_on("1 node x 6 cores x 1 threads");
  calls.pool.own_cores = true;
  for (int step = 0; step < 3; ++step) {
    calls.gaps.insert(calls.gaps.end(), 20, 300'000);
    calls.gaps.push_back(7'000'000);
  }
  const Result result = simulate(calls);
  for (size_t number = 2; number < result.calls.size(); ++number) {
    const bool after_pause = number % 21 == 0;
    EXPECT_EQ(result.calls[number].counts.futex_waits, after_pause ? result.workers - 1 : 0)
        << number;
  }
}

TEST(BesideAGpu, WorkersDoNotSpinForCallsThatAreTooFarApart) {
  Calls calls = calls_on("1 node x 6 cores x 1 threads");
  calls.pool.own_cores = true;
  calls.gaps = {300'000, 300'000};
  calls.gaps.insert(calls.gaps.end(), 30, 5'000'000);
  calls.idle = 60'000;
  const Result result = simulate(calls);
  EXPECT_EQ(result.asleep, result.workers - 1);
}

TEST(WithoutAGpu, WorkersSleepAfter50Microseconds) {
  Calls calls = calls_on("1 node x 6 cores x 1 threads");
  calls.gaps = {20'000, 300'000, 300'000, 40'000};
  calls.idle = 60'000;
  const Result result = simulate(calls);
  EXPECT_EQ(result.calls[1].counts.futex_waits, 0);
  EXPECT_EQ(result.calls[3].counts.futex_waits, result.workers - 1);
  EXPECT_EQ(result.calls[4].counts.futex_waits, 0);
  EXPECT_EQ(result.asleep, result.workers - 1);
}

TEST(PowerSaving, WorkersSleepAtOnceBesideAGpuToo) {
  for (bool own_cores : {false, true}) {
    Calls calls = calls_on("1 node x 6 cores x 1 threads");
    calls.pool.power_saving = true;
    calls.pool.own_cores = own_cores;
    calls.gaps = {300'000, 300'000, 300'000};
    calls.idle = 2'000;
    const Result result = simulate(calls);
    for (const Call& call : result.calls) EXPECT_GE(call.counts.futex_waits, result.workers - 1);
    EXPECT_EQ(result.asleep, result.workers - 1);
  }
}

// A worker looks at the queue of another team only when its own has no pieces left.
TEST(PhaseLines, OneQueueWhileItHasPieces) {
  start({0, 1}, 2, {});
  {
    const PoolPlan plan = plan_pool(parse_topology("2 nodes x 1 cores x 1 threads"), {});
    Phase phase;
    for (int team = 0; team < 2; ++team) phase.set(team, 0, 5);
    take_counts();
    Thread worker([&] {
      Phase::Claim claim = phase.first(1, plan);
      for (int piece = 0; piece < 4; ++piece) {
        EXPECT_EQ(claim.team, 1);
        EXPECT_GE(claim.index, 0);
        claim = phase.claim(claim, 1, plan);
      }
      Counts counts = take_counts();
      EXPECT_EQ(counts.lines["queue"].reads, 1);
      EXPECT_EQ(counts.lines["queue"].updates, 5);
      EXPECT_EQ(counts.lines["open queues"].updates, 1);
      EXPECT_EQ(phase.claim(claim, 1, plan).team, 0);
      counts = take_counts();
      EXPECT_EQ(counts.lines["queue"].reads, 1);
      EXPECT_EQ(counts.lines["queue"].updates, 1);
    });
    worker.join();
  }
  stop();
}

}  // namespace
}  // namespace lk::simulation

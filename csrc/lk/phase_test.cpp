#include "lk/phase.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <thread>
#include <utility>
#include <vector>

namespace lk {
namespace {

PoolPlan plan_of(const char* topology) { return plan_pool(parse_topology(topology), {}); }

// The teams whose pieces a worker of `team` claims, one after the other.
std::vector<int> teams_claimed(Phase& phase, int team, const PoolPlan& plan) {
  std::vector<int> claimed;
  Phase::Claim claim = phase.first(team, plan);
  for (; claim.index >= 0; claim = phase.claim(claim, team, plan)) claimed.push_back(claim.team);
  return claimed;
}

TEST(Phase, OwnTeamFirstThenTheOthersInTurn) {
  const PoolPlan plan = plan_of("4 nodes x 1 cores x 1 threads");
  Phase phase;
  for (int team = 0; team < 4; ++team) phase.set(team, 0, 2);
  EXPECT_EQ(teams_claimed(phase, 2, plan), (std::vector<int>{2, 2, 3, 3, 0, 0, 1, 1}));
}

TEST(Phase, TeamsOfTheOwnNodeBeforeOthers) {
  const PoolPlan plan = plan_of("2 nodes x 40 cores x 1 threads");
  ASSERT_EQ(plan.teams.size(), 6u);
  for (const auto& [team, wanted] : {std::pair{1, std::vector<int>{1, 2, 0, 3, 4, 5}},
                                     std::pair{2, std::vector<int>{2, 0, 1, 3, 4, 5}},
                                     std::pair{4, std::vector<int>{4, 5, 3, 0, 1, 2}}}) {
    Phase phase;
    for (int other = 0; other < 6; ++other) phase.set(other, 0, 1);
    EXPECT_EQ(teams_claimed(phase, team, plan), wanted) << team;
  }
}

TEST(Phase, PiecesOfATeamInOrder) {
  const PoolPlan plan = plan_of("1 node x 1 cores x 1 threads");
  Phase phase;
  phase.set(0, 4, 7);
  Phase::Claim claim{0, 0};
  for (int64_t index = 4; index < 7; ++index) {
    claim = phase.claim(claim, 0, plan);
    EXPECT_EQ(claim.index, index);
  }
  EXPECT_LT(phase.claim(claim, 0, plan).index, 0);
}

TEST(Phase, TeamsWithoutWorkAreSkipped) {
  const PoolPlan plan = plan_of("4 nodes x 1 cores x 1 threads");
  Phase phase;
  phase.set(0, 0, 0);
  phase.set(1, 0, 1);
  phase.set(3, 0, 1);
  EXPECT_EQ(teams_claimed(phase, 0, plan), (std::vector<int>{1, 3}));
  EXPECT_EQ(teams_claimed(phase, 0, plan), std::vector<int>());
}

TEST(Phase, HasAQueueForEachOfTheMostTeams) {
  const PoolPlan plan = plan_of("64 nodes x 3 cores x 1 threads");
  ASSERT_EQ(plan.teams.size(), static_cast<size_t>(kMaxTeams));
  Phase phase;
  std::vector<int> wanted;
  for (int turn = 0; turn < kMaxTeams; ++turn) {
    phase.set(turn, 0, 1);
    wanted.push_back((63 + turn) % kMaxTeams);
  }
  EXPECT_EQ(teams_claimed(phase, 63, plan), wanted);
}

// A worker takes pieces of other teams only when its own has none left, and does all pieces if no
// other worker comes. It claims a piece of the same queue ahead, and no piece of another queue.
TEST(Phase, OthersAreHelpedLast) {
  const PoolPlan plan = plan_of("3 nodes x 1 cores x 1 threads");
  Phase phase;
  for (int team = 0; team < 3; ++team) phase.set(team, 0, 5);
  std::vector<int> ran;
  phase.run(phase.first(1, plan), 1, plan, [&](Phase::Claim now, Phase::Claim next) {
    ran.push_back(now.team);
    EXPECT_EQ(next.index < 0, ran.size() % 5 == 0);
    EXPECT_TRUE(next.index < 0 || next.team == now.team);
  });
  phase.wait();
  std::vector<int> wanted;
  for (int team : {1, 2, 0}) wanted.insert(wanted.end(), 5, team);
  EXPECT_EQ(ran, wanted);
}

// Each piece runs once, and a worker that leaves the phase sees what all pieces wrote. The last
// piece takes longer than workers spin, so they sleep.
TEST(Phase, EveryPieceOnceAndDoneAfterTheWait) {
  constexpr int kNodes = 2;
  constexpr int kPieces = 50;
  const PoolPlan plan = plan_of("2 nodes x 2 cores x 1 threads");
  for (int round = 0; round < 20; ++round) {
    Phase phase;
    for (int team = 0; team < kNodes; ++team) phase.set(team, 0, kPieces);
    int done[kNodes][kPieces] = {};
    const auto work = [&](int team) {
      phase.run(phase.first(team, plan), team, plan, [&](Phase::Claim now, Phase::Claim) {
        if (now.index == kPieces - 1) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        ++done[now.team][now.index];
      });
      phase.wait();
      for (const auto& pieces : done) {
        for (int count : pieces) EXPECT_EQ(count, 1);
      }
    };
    std::vector<std::thread> threads;
    for (int worker = 0; worker < 4; ++worker) threads.emplace_back(work, worker % kNodes);
    for (std::thread& thread : threads) thread.join();
  }
}

// A waiting thread calls idle() until that returns false or the last piece is done.
TEST(Phase, IdleWhileOthersWork) {
  const PoolPlan plan = plan_of("1 node x 2 cores x 1 threads");
  for (int most : {3, INT_MAX}) {
    Phase phase;
    phase.set(0, 0, 1);
    const Phase::Claim claim = phase.first(0, plan);
    std::atomic<int> idle{0};
    std::thread other([&] {
      while (idle < 3) std::this_thread::yield();
      phase.run(claim, 0, plan, [](Phase::Claim, Phase::Claim) {});
    });
    const auto once_more = [&] { return ++idle < most; };
    phase.wait(once_more);
    EXPECT_TRUE(phase.done());
    const int before = idle;
    if (most == 3) {
      EXPECT_EQ(before, 3);
    }
    phase.wait(once_more);  // nothing is left to wait for
    EXPECT_EQ(idle, before);
    other.join();
  }
}

}  // namespace
}  // namespace lk

#include "lk/phase.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <thread>
#include <vector>

namespace lk {
namespace {

std::vector<int> nodes_claimed(Phase& phase, int node, int nodes) {
  std::vector<int> claimed;
  Phase::Claim claim = phase.claim({node, 0}, node, nodes);
  for (; claim.index >= 0; claim = phase.claim(claim, node, nodes)) claimed.push_back(claim.node);
  return claimed;
}

TEST(Phase, OwnNodeFirstThenTheOthersInTurn) {
  Phase phase;
  for (int node = 0; node < 4; ++node) phase.set(node, 2);
  EXPECT_EQ(nodes_claimed(phase, 2, 4), (std::vector<int>{2, 2, 3, 3, 0, 0, 1, 1}));
}

TEST(Phase, PiecesOfANodeInOrder) {
  Phase phase;
  phase.set(0, 3);
  Phase::Claim claim{0, 0};
  for (int64_t index = 0; index < 3; ++index) {
    claim = phase.claim(claim, 0, 1);
    EXPECT_EQ(claim.index, index);
  }
  EXPECT_LT(phase.claim(claim, 0, 1).index, 0);
}

TEST(Phase, NodesWithoutWorkAreSkipped) {
  Phase phase;
  phase.set(1, 1);
  phase.set(3, 1);
  EXPECT_EQ(nodes_claimed(phase, 0, 4), (std::vector<int>{1, 3}));
  EXPECT_EQ(nodes_claimed(phase, 0, 4), std::vector<int>());
}

// A worker takes pieces of other nodes only when its own node has none left, and does all pieces if
// no other worker comes.
TEST(Phase, OthersAreHelpedLast) {
  Phase phase;
  for (int node = 0; node < 3; ++node) phase.set(node, 5);
  std::vector<int> ran;
  phase.run(phase.first(1, 3), 1, 3, [&](Phase::Claim now, Phase::Claim next) {
    ran.push_back(now.node);
    EXPECT_EQ(next.index < 0, ran.size() == 15);
  });
  phase.wait();
  std::vector<int> wanted;
  for (int node : {1, 2, 0}) wanted.insert(wanted.end(), 5, node);
  EXPECT_EQ(ran, wanted);
}

// Each piece runs once, and a worker that leaves the phase sees what all pieces wrote. The last
// piece takes longer than workers spin, so they sleep.
TEST(Phase, EveryPieceOnceAndDoneAfterTheWait) {
  constexpr int kNodes = 2;
  constexpr int kPieces = 50;
  for (int round = 0; round < 20; ++round) {
    Phase phase;
    for (int node = 0; node < kNodes; ++node) phase.set(node, kPieces);
    int done[kNodes][kPieces] = {};
    const auto work = [&](int node) {
      phase.run(phase.first(node, kNodes), node, kNodes, [&](Phase::Claim now, Phase::Claim) {
        if (now.index == kPieces - 1) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        ++done[now.node][now.index];
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
  for (int most : {3, INT_MAX}) {
    Phase phase;
    phase.set(0, 1);
    const Phase::Claim claim = phase.first(0, 1);
    std::atomic<int> idle{0};
    std::thread other([&] {
      while (idle < 3) std::this_thread::yield();
      phase.run(claim, 0, 1, [](Phase::Claim, Phase::Claim) {});
    });
    const auto once_more = [&] { return ++idle < most; };
    phase.wait(once_more);
    EXPECT_TRUE(phase.left.zero());
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

// The work of a job that has phases: pieces of work that threads claim, and the wait at the end of
// each phase.
#pragma once

#include <bit>
#include <cstdint>
#include <memory>

#include "lk/thread_pool.h"
#include "lk/wait.h"

namespace lk {

// The pieces of one team, which are claimed one by one. They have the numbers from `next` to `end`.
struct alignas(64) Queue {
  Queue(int64_t begin, int64_t end)
      : next(begin), end(end), left(static_cast<uint32_t>(end - begin)) {
    name_line(this, "queue");
  }

  Atomic<int64_t> next;
  int64_t end;
  Atomic<uint32_t> left;  // pieces that are not done
};

// One phase: its pieces, divided among teams, and how many teams' pieces are not done.
//
// Only the threads of a team change the words of its queue, while the queue has pieces. What all
// threads look at, `open_` and `left`, changes once for each queue and not once for each thread:
// 192 threads that lower one word while they watch it pass its cache line around 18,000 times.
class Phase {
 public:
  explicit Phase(const char* name = "phase") {
    name_line(&left_, name);
    name_line(&open_, "open queues");
  }

  // Gives a team the pieces with the numbers from `begin` to `end`, which may be none. Each team
  // must be given its pieces once, before any thread works.
  void set(int team, int64_t begin, int64_t end) {
    std::construct_at(&queues_[team], begin, end);
    if (begin == end) return;
    open_.store(open_.load(std::memory_order_relaxed) | bit(team), std::memory_order_relaxed);
    left_.add(1);
  }

  // A piece of work: number `index`, from the queue of `team`. Negative if no piece is left.
  struct Claim {
    int team = 0;
    int64_t index = -1;
  };

  // The next piece for a worker of `team` after its piece `last`. The queue of `last` comes first,
  // then the worker's own, those of other teams on its node, and those of other nodes.
  Claim claim(Claim last, int team, const PoolPlan& plan) {
    const Claim next = claim_from(last.team);
    return next.index >= 0 ? next : search(team, plan);
  }
  Claim first(int team, const PoolPlan& plan) { return claim({team, 0}, team, plan); }

  // Runs piece(claim, next) for `now`, which the worker has claimed, and then for more pieces until
  // none is left. The next piece of a queue is claimed before the one ahead of it runs, so that
  // piece() can prefetch the first rows of `next`. Other queues are looked at later, since others
  // may be waiting for the piece at hand.
  template <class Piece>
  void run(Claim now, int team, const PoolPlan& plan, Piece&& piece) {
    while (now.index >= 0) {
      uint32_t done = 0;
      for (Claim next; now.index >= 0; now = next) {
        next = claim_from(now.team);
        piece(now, next);
        ++done;
      }
      if (queues_[now.team].left.fetch_sub(done) == done) left_.subtract(1);
      now = search(team, plan);
    }
  }

  // Waits until all pieces are done. Meanwhile it calls idle() until that returns false.
  template <class Idle>
  void wait(Idle&& idle) {
    while (!done() && idle()) {
    }
    left_.wait();
  }
  void wait() { left_.wait(); }
  bool done() const { return left_.zero(); }

 private:
  static_assert(kMaxTeams <= 64, "open_ has a bit for each team");
  static uint64_t bit(int team) { return uint64_t{1} << team; }

  Claim claim_from(int team) {
    Queue& queue = queues_[team];
    if (queue.next.load(std::memory_order_relaxed) >= queue.end) return {team, -1};
    const int64_t index = queue.next.fetch_add(1, std::memory_order_relaxed);
    if (index == queue.end - 1) open_.fetch_and(~bit(team), std::memory_order_relaxed);
    return {team, index < queue.end ? index : -1};
  }

  // A piece from any queue.
  Claim search(int team, const PoolPlan& plan) {
    uint64_t failed = 0;  // queues without pieces, whose bits are about to be cleared
    while (uint64_t open = open_.load(std::memory_order_relaxed) & ~failed) {
      if ((open & plan.teams[team].of_node) != 0) open &= plan.teams[team].of_node;
      const int from = (team + std::countr_zero(std::rotr(open, team))) % 64;
      const Claim claim = claim_from(from);
      if (claim.index >= 0) return claim;
      failed |= bit(from);
    }
    return {team, -1};
  }

  // set() makes those that there are. To initialise all of them is a third of the instructions of a
  // call that computes nothing.
  union {
    Queue queues_[kMaxTeams];
  };
  alignas(64) Atomic<uint64_t> open_{0};  // queues with pieces that nobody has claimed
  Countdown left_;                        // queues with pieces that are not done
};

}  // namespace lk

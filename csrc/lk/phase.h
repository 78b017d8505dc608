// Work of a job that comes in phases: pieces that threads claim, and the wait between two phases.
#pragma once

#include <atomic>
#include <cstdint>

#include "lk/topology.h"
#include "lk/wait.h"

namespace lk {

// Pieces of one node, claimed one by one.
struct alignas(64) Queue {
  std::atomic<int64_t> next{0};
  int64_t count = 0;
};

// One phase: pieces divided among nodes, and how many are not done.
struct Phase {
  Queue queues[kMaxNodes];
  Countdown left;

  void set(int node, int64_t count) {
    queues[node].count = count;
    left.add(static_cast<uint32_t>(count));
  }

  // A piece of work: number `index` of the queue of `node`; none left if index is negative.
  struct Claim {
    int node = 0;
    int64_t index = -1;
  };

  // The next piece for a worker: of its own node first, then of the others, from `claim.node` on.
  Claim claim(Claim last, int node, int nodes) {
    for (int tried = (last.node - node + nodes) % nodes; tried < nodes; ++tried) {
      const int from = (node + tried) % nodes;
      Queue& queue = queues[from];
      if (queue.next.load(std::memory_order_relaxed) >= queue.count) continue;
      const int64_t index = queue.next.fetch_add(1, std::memory_order_relaxed);
      if (index < queue.count) return {from, index};
    }
    return {(node + nodes - 1) % nodes, -1};
  }

  Claim first(int node, int nodes) { return claim({node, 0}, node, nodes); }

  // Runs `now`, which the worker has claimed, and then pieces until none is left. Each is claimed
  // while the one before it runs, so that its first rows can be prefetched: piece(claim, next).
  template <class Piece>
  void run(Claim now, int node, int nodes, Piece&& piece) {
    uint32_t mine = 0;
    while (now.index >= 0) {
      const Claim next = claim(now, node, nodes);
      piece(now, next);
      ++mine;
      now = next;
    }
    if (mine != 0) left.subtract(mine);
  }

  // Waits until all pieces are done; calls idle() meanwhile, until it returns false.
  template <class Idle>
  void wait(Idle&& idle) {
    while (!left.zero() && idle()) {
    }
    left.wait();
  }
  void wait() { left.wait(); }
};

}  // namespace lk

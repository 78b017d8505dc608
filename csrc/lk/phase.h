// The work of a job that has phases: pieces of work that threads claim, and the wait at the end of
// each phase.
#pragma once

#include <atomic>
#include <cstdint>

#include "lk/topology.h"
#include "lk/wait.h"

namespace lk {

// The pieces of one node, which are claimed one by one.
struct alignas(64) Queue {
  std::atomic<int64_t> next{0};
  int64_t count = 0;
};

// One phase: its pieces, divided among nodes, and how many of them are not done.
struct Phase {
  Queue queues[kMaxNodes];
  Countdown left;

  void set(int node, int64_t count) {
    queues[node].count = count;
    left.add(static_cast<uint32_t>(count));
  }

  // A piece of work: number `index` in the queue of `node`. Negative if no piece is left.
  struct Claim {
    int node = 0;
    int64_t index = -1;
  };

  // The next piece for a worker on `node` after its piece `last`. Pieces of its own node come
  // first, then those of the following nodes.
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

  // Runs piece(claim, next) for `now`, which the worker has claimed, and then for more pieces until
  // none is left. Each piece is claimed before the one ahead of it runs, so that piece() can
  // prefetch the first rows of `next`.
  template <class Piece>
  void run(Claim now, int node, int nodes, Piece&& piece) {
    uint32_t done = 0;
    while (now.index >= 0) {
      const Claim next = claim(now, node, nodes);
      piece(now, next);
      ++done;
      now = next;
    }
    if (done != 0) left.subtract(done);
  }

  // Waits until all pieces are done. Meanwhile it calls idle() until that returns false.
  template <class Idle>
  void wait(Idle&& idle) {
    while (!left.zero() && idle()) {
    }
    left.wait();
  }
  void wait() { left.wait(); }
};

}  // namespace lk

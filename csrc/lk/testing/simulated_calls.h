// Calls of the expert block on a simulated machine. The kernels compute nothing, but take the time
// of reading their weights, so no weights are needed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lk/thread_pool.h"

namespace lk::simulation {

struct Calls {
  std::string topology;  // see parse_topology
  int sockets = 1;
  PoolOptions pool;
  int64_t hidden = 7168;
  int64_t intermediate = 2048;
  int64_t experts = 256;
  int64_t topk = 8;
  int64_t tokens = 1;
  int64_t bits = 4;           // of a weight, 4 or 8
  double scale_bytes = 0;     // for each byte of weights
  double machine_rate = 0;    // memory bandwidth in bytes per ns; 0: weights take no time
  std::vector<int64_t> gaps;  // nanoseconds between the calls; the first call has no gap
  int64_t idle = 0;           // nanoseconds after the last call
};

struct Call {
  Counts counts;       // of the gap before the call and of the call
  int64_t ns = 0;      // that the call took
  int64_t tiles = 0;   // that were multiplied
  int64_t stolen = 0;  // tiles of one node that a worker of another node multiplied
  int64_t bytes = 0;   // of weights and scales that were read
};

struct Result {
  std::vector<Call> calls;
  Counts after;        // of the idle time after the last call
  int64_t asleep = 0;  // workers that sleep at its end
  int workers = 0;
  int nodes = 0;
};

// Makes one call more than there are gaps.
Result simulate(const Calls& calls);

}  // namespace lk::simulation

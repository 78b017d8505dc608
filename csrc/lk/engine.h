// The process-wide engine: one pool, one workspace, one set of kernels, and the layers by handle.
#pragma once

#include <string>

#include "lk/memory.h"
#include "lk/moe.h"
#include "lk/thread_pool.h"
#include "lk/topology.h"

namespace lk {

struct EngineOptions {
  PoolOptions pool;
  std::vector<int> cpus;    // run on these only; empty: all that the process may use
  std::string topology;     // a synthetic machine, see parse_topology; empty: the real one
  std::string isa;          // empty: LK_ISA from the environment, else the best this CPU runs
  bool interleave = false;  // banks lie on all nodes in turns, not on those that compute them
  bool shared = false;      // banks can be mapped by other processes
};

struct EngineInfo {
  std::string isa;
  PoolOptions options;
  PoolPlan plan;
};

// All functions may be called from any thread; calls take turns on one mutex, which costs some 20
// ns when nobody else is there. The pool starts at the first use and is started anew in a forked
// child. Errors are std::invalid_argument (wrong value), OutOfMemory, or std::runtime_error.

// Takes effect at once; waits for a running call.
void configure(const EngineOptions& options);

// The machine as configured: real or synthetic, after affinity, cpuset and the list of CPUs.
Topology engine_topology();
EngineInfo engine_info();

// A number other than 0 that names the layer until it is destroyed. Its weights come row-major, are
// put into the kernels' order in place, and stay the caller's; `ordered`: they come in that order
// and are only read.
int64_t create_layer(const LayerSpec& layer, bool ordered = false);
void destroy_layer(int64_t handle);
// Destroys the layer and puts its weights back into row-major order.
void restore_layer(int64_t handle);

// Where run_layer notes rows of y that are not finite, until it is called again; null: nowhere.
// The log is zero where nothing happened, is kept alive by the caller, and may lie in memory that
// several processes share.
struct LoggedFault {
  int64_t layer;   // handle; in the first entry: how many rows have been noted
  int64_t source;  // FaultSource
  int64_t expert;
};
// `log` has rows + 2 entries: a count, then one for each row, the last for all beyond them. The
// first fault of a row is kept: those of later layers are its consequences.
void watch(LoggedFault* log, int64_t rows);

// y of the batch; hidden is the x row length that the caller has, checked against the layer's.
void run_layer(int64_t handle, const Batch& batch, int64_t hidden);

// From now on run_layer allocates nothing for up to so many tokens of the layer with 32-bit ids.
void reserve(int64_t handle, int64_t tokens, int64_t topk);

// Memory for a bank of experts, its rows on the nodes that compute them. Free it with release().
void* allocate_bank(const RowLayout& layout);

}  // namespace lk

// The engine of this process: one pool, one workspace, one set of kernels, and the layers, each
// with a handle.
#pragma once

#include <string>

#include "lk/choice.h"
#include "lk/linear.h"
#include "lk/memory.h"
#include "lk/moe.h"
#include "lk/thread_pool.h"
#include "lk/topology.h"

namespace lk {

struct EngineOptions {
  PoolOptions pool;
  std::vector<int> cpus;    // the CPUs to run on; empty: all that the process may use
  std::string topology;     // a made-up machine, see parse_topology; empty: the real one
  std::string isa;          // empty: LK_ISA from the environment, else what is fastest here
  bool interleave = false;  // pages of banks are on all nodes round-robin
  bool shared = false;      // other processes can map banks
};

struct EngineInfo {
  const Kernels* kernels;
  std::vector<Rate> rates;  // that the choice of the kernels rests on; none if `isa` was given
  PoolOptions options;
  PoolPlan plan;
};

// All functions may be called from any thread. Calls take turns on one mutex, which costs about 20
// ns if no other call is running. The pool starts at its first use, and once more in a forked
// child. Errors are std::invalid_argument for a wrong value, OutOfMemory, or std::runtime_error.

// Waits for a running call, then takes effect. If it throws, nothing has changed.
void configure(const EngineOptions& options);

// The machine as configured: the real or made-up one, with the CPUs that affinity, cpuset and
// EngineOptions::cpus leave.
Topology engine_topology();
EngineInfo engine_info();

// Returns a handle, a number other than 0, that names the layer until it is destroyed. The weights
// come row-major, and this puts them into the kernels' order in place; they still belong to the
// caller. With `ordered`, the weights are in that order already and are only read.
int64_t create_layer(const LayerSpec& layer, bool ordered = false);
void destroy_layer(int64_t handle);
// The same for a linear layer, whose handle is for run_linear alone.
int64_t create_linear(const LinearSpec& layer);
void destroy_linear(int64_t handle);
// Puts the weights back into row-major order and destroys the layer.
void restore_layer(int64_t handle);

// An entry of the log of rows of y that are not finite. An entry is zero where nothing happened.
struct LoggedFault {
  int64_t layer;   // its handle; in the first entry, how many rows have been noted
  int64_t source;  // FaultSource
  int64_t expert;
};
// Lets run_layer write to `log` until watch() is called again; null: to no log. The log has rows +
// 2 entries: a count, one for each row, and one for all rows beyond them. It keeps the first fault
// of a row, because faults in later layers are its consequences. The caller keeps the log alive; it
// may be in memory that several processes share.
void watch(LoggedFault* log, int64_t rows);

// From now on, run_layer adds what it does to `counters`, a struct LayerCounters and a number for
// each expert in `size` numbers of 8 bytes. Null ends this, as the layer's end does; the caller
// keeps the memory alive until then.
void count(int64_t handle, int64_t* counters, int64_t size);

// Computes y of the batch. `hidden` is the length of the caller's rows of x, which must be the
// layer's hidden size.
void run_layer(int64_t handle, const Batch& batch, int64_t hidden);

// Computes y of the batch with a linear layer. `k` and `rows` are the lengths of the caller's rows
// of x and y, which must be those of the layer's matrix.
void run_linear(int64_t handle, const LinearBatch& batch, int64_t k, int64_t rows);

// From now on, run_layer allocates nothing for batches of up to so many tokens with 32-bit ids.
// Throws std::invalid_argument for numbers that no batch has.
void reserve(int64_t handle, int64_t tokens, int64_t topk);

// Allocates memory for a bank of experts, with each row on the node that computes it. Free it with
// release().
void* allocate_bank(const RowLayout& layout);

}  // namespace lk

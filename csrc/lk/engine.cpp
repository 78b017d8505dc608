#include "lk/engine.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "lk/nodes.h"

namespace lk {
namespace {

// The most that reserve() takes. Batches need not be so small, but no model needs as much, and
// their products stay far from 2^63.
constexpr int64_t kMostTokens = std::numeric_limits<int32_t>::max();
constexpr int64_t kMostTopk = 4096;

struct Engine {
  std::mutex mutex;
  EngineOptions options;
  const Kernels* kernels = nullptr;
  std::unique_ptr<ThreadPool> pool;
  Workspace workspace;
  std::unordered_map<int64_t, LayerSpec> layers;
  std::unordered_map<int64_t, LinearSpec> linears;
  int64_t next_handle = 1;
  LoggedFault* log = nullptr;
  int64_t log_rows = 0;
};

// The engine is never destroyed: while the process exits, workers may still be spinning and tensors
// may be released.
Engine& engine() {
  static Engine* instance = [] {
    auto* created = new Engine;
    // fork() copies the memory but not the workers. So it first waits for a running call, and the
    // child forgets the pool (joining threads that do not exist would hang) and starts its own pool
    // when it needs one.
    pthread_atfork([] { engine().mutex.lock(); }, [] { engine().mutex.unlock(); },
                   [] {
                     static_cast<void>(engine().pool.release());
                     engine().mutex.unlock();
                   });
    return created;
  }();
  return *instance;
}

Topology topology_of(const EngineOptions& options) {
  Topology topology = options.topology.empty() ? detect_topology("/sys", allowed_cpus())
                                               : parse_topology(options.topology);
  return options.cpus.empty() ? topology : restrict_topology(topology, options.cpus);
}

// The value of LK_ISA without the white space around it, which lvllm.settings ignores, too.
std::string forced_isa() {
  const char* variable = std::getenv("LK_ISA");
  const std::string written = variable ? variable : "";
  const char* space = " \t\n\v\f\r";
  const size_t first = written.find_first_not_of(space);
  if (first == std::string::npos) return "";
  return written.substr(first, written.find_last_not_of(space) - first + 1);
}

const Kernels& kernels_of(const EngineOptions& options) {
  return choose_kernels(options.isa.empty() ? forced_isa() : options.isa);
}

// Chooses the kernels and starts the pool if that has not happened yet. The caller holds the mutex.
ThreadPool& started_pool(Engine& e) {
  if (!e.kernels) e.kernels = &kernels_of(e.options);
  if (!e.pool) e.pool = std::make_unique<ThreadPool>(topology_of(e.options), e.options.pool);
  return *e.pool;
}

// The layer of a handle; `kind` names what it is one of. The caller holds the mutex.
template <class Spec>
const Spec& layer_of(const std::unordered_map<int64_t, Spec>& layers, int64_t handle,
                     const char* kind) {
  const auto found = layers.find(handle);
  if (found == layers.end()) {
    throw std::invalid_argument("layer handle " + std::to_string(handle) + " names no " + kind +
                                " layer; was it released?");
  }
  return found->second;
}
const LayerSpec& layer_of(const Engine& e, int64_t handle) {
  return layer_of(e.layers, handle, "expert");
}

// Throws std::invalid_argument unless the caller's rows have as many elements as the layer's.
void check_length(const char* name, int64_t given, const char* size, int64_t wanted) {
  if (given == wanted) return;
  throw std::invalid_argument(std::string(name) + " has rows of " + std::to_string(given) +
                              " elements, the layer's " + size + " is " + std::to_string(wanted));
}

// The same extents, divided into pieces of at most `bytes`.
std::vector<Extent> split(const std::vector<Extent>& extents, int64_t bytes) {
  std::vector<Extent> pieces;
  for (const Extent& extent : extents) {
    for (int64_t at = extent.begin; at < extent.end; at += bytes) {
      pieces.push_back({at, std::min(at + bytes, extent.end), extent.node});
    }
  }
  return pieces;
}

// Makes huge pages before anything is loaded: later, the kernel would have to copy the small pages.
void* allocate_shared_bank(const RowLayout& layout, bool several_nodes, bool interleave_pages,
                           ThreadPool& pool) {
  const PoolPlan& plan = pool.plan();
  const std::vector<int> nodes = several_nodes && !interleave_pages ? plan.nodes : memory_nodes();
  const bool divided = several_nodes && !interleave_pages;
  const int64_t page = divided ? placement_page(layout, plan.node_workers) : kHugePage;
  std::vector<Extent> extents{{0, layout.bytes(), 0}};
  if (divided) extents = plan_placement(layout, plan.node_workers, page);
  // Without interleaving, threads take pieces of 128 MiB; with it, each node in turn gets a page.
  extents = split(extents, interleave_pages ? kHugePage : int64_t{128} << 20);
  for (size_t i = 0; interleave_pages && i < extents.size(); ++i) {
    extents[i].node = static_cast<int>(i % nodes.size());
  }
  void* memory = allocate_shared(layout.bytes());
  for_each_index(pool, static_cast<int64_t>(extents.size()), [&](int64_t index, int) {
    const Extent& extent = extents[index];
    const int node = nodes[extent.node];
    touch_on_node(memory, extent, node, page);
    const bool small = page == kHugePage && !make_huge(memory, extent);
    if (small && several_nodes) touch_on_node(memory, extent, node);
  });
  return memory;
}

}  // namespace

void configure(const EngineOptions& options) {
  Engine& e = engine();
  const std::lock_guard lock(e.mutex);
  // Everything that can be wrong is found before the old pool ends.
  const Topology topology = topology_of(options);
  const Kernels& kernels = kernels_of(options);
  plan_pool(topology, options.pool);
  e.pool.reset();
  e.pool = std::make_unique<ThreadPool>(topology, options.pool);
  e.kernels = &kernels;
  e.options = options;
}

Topology engine_topology() {
  Engine& e = engine();
  const std::lock_guard lock(e.mutex);
  return topology_of(e.options);
}

EngineInfo engine_info() {
  Engine& e = engine();
  const std::lock_guard lock(e.mutex);
  const ThreadPool& pool = started_pool(e);
  const bool chosen = e.kernels == &choose_kernels("");
  return {e.kernels, chosen ? fastest_kernels().rates : std::vector<Rate>{}, e.options.pool,
          pool.plan()};
}

int64_t create_layer(const LayerSpec& layer, bool ordered) {
  Engine& e = engine();
  const std::lock_guard lock(e.mutex);
  if (!ordered) order_layer(layer, started_pool(e));
  e.layers.emplace(e.next_handle, layer);
  return e.next_handle++;
}

void destroy_layer(int64_t handle) {
  Engine& e = engine();
  const std::lock_guard lock(e.mutex);
  e.layers.erase(handle);
}

void restore_layer(int64_t handle) {
  Engine& e = engine();
  const std::lock_guard lock(e.mutex);
  restore_layer(layer_of(e, handle), started_pool(e));
  e.layers.erase(handle);
}

int64_t create_linear(const LinearSpec& layer) {
  Engine& e = engine();
  const std::lock_guard lock(e.mutex);
  order_linear(layer, started_pool(e));
  e.linears.emplace(e.next_handle, layer);
  return e.next_handle++;
}

void destroy_linear(int64_t handle) {
  Engine& e = engine();
  const std::lock_guard lock(e.mutex);
  e.linears.erase(handle);
}

void run_linear(int64_t handle, const LinearBatch& batch, int64_t k, int64_t rows) {
  Engine& e = engine();
  const std::lock_guard lock(e.mutex);
  const LinearSpec& layer = layer_of(e.linears, handle, "linear");
  check_length("x", k, "input size", layer.matrix.k);
  check_length("y", rows, "output size", layer.matrix.rows);
  ThreadPool& pool = started_pool(e);
  linear(layer, batch, *e.kernels, pool, e.workspace);
}

void watch(LoggedFault* log, int64_t rows) {
  Engine& e = engine();
  const std::lock_guard lock(e.mutex);
  e.log = log;
  e.log_rows = rows;
}

void count(int64_t handle, int64_t* counters, int64_t size) {
  Engine& e = engine();
  const std::lock_guard lock(e.mutex);
  const int64_t wanted = sizeof(LayerCounters) / sizeof(int64_t) + layer_of(e, handle).experts;
  if (counters != nullptr && size != wanted) {
    throw std::invalid_argument("counters has " + std::to_string(size) + " elements, wanted " +
                                std::to_string(wanted));
  }
  e.layers.at(handle).counters = reinterpret_cast<LayerCounters*>(counters);
}

void run_layer(int64_t handle, const Batch& batch, int64_t hidden) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point start) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
  };
  Engine& e = engine();
  std::unique_lock lock(e.mutex, std::try_to_lock);
  int64_t waited = 0;
  if (!lock) {
    const auto start = Clock::now();
    lock.lock();
    waited = since(start);
  }
  const LayerSpec& layer = layer_of(e, handle);
  check_length("x", hidden, "hidden size", layer.hidden);
  ThreadPool& pool = started_pool(e);
  const auto start = Clock::now();
  const std::vector<Fault> faults = expert_block(layer, batch, *e.kernels, pool, e.workspace);
  if (layer.counters != nullptr) {
    auto& of = layer.counters->of[static_cast<int>(batch.reason)];
    if (!batch.rest) {
      ++of.calls;
      of.tokens += batch.tokens;
    }
    of.nanoseconds += since(start);
    layer.counters->waited += waited;
  }
  if (e.log == nullptr) return;
  for (const Fault& fault : faults) {
    LoggedFault& entry = e.log[1 + std::min(batch.first_row + fault.row, e.log_rows)];
    if (entry.layer != 0) continue;
    entry = {handle, static_cast<int64_t>(fault.source), fault.expert};
    ++e.log->layer;
  }
}

void reserve(int64_t handle, int64_t tokens, int64_t topk) {
  Engine& e = engine();
  const std::lock_guard lock(e.mutex);
  const LayerSpec& layer = layer_of(e, handle);
  if (tokens < 0 || tokens > kMostTokens || topk < 0 || topk > kMostTopk) {
    throw std::invalid_argument("cannot reserve memory for " + std::to_string(tokens) + " x " +
                                std::to_string(topk) + " experts: at most " +
                                std::to_string(kMostTokens) + " tokens x " +
                                std::to_string(kMostTopk) + " experts");
  }
  ThreadPool& pool = started_pool(e);
  reserve_workspace(layer, tokens, topk, *e.kernels, pool, e.workspace);
}

void* allocate_bank(const RowLayout& layout) {
  const int64_t bytes = layout.bytes();
  Engine& e = engine();
  const std::lock_guard lock(e.mutex);
  ThreadPool& pool = started_pool(e);
  const PoolPlan& plan = pool.plan();
  // On one node the kernel makes pages when the loader writes them, so that no more is resident
  // than has been loaded.
  const bool several_nodes = e.options.topology.empty() && memory_nodes().size() > 1;
  if (e.options.shared) {
    return allocate_shared_bank(layout, several_nodes, e.options.interleave, pool);
  }
  if (several_nodes && e.options.interleave) {
    void* memory = allocate(bytes);
    interleave(memory, bytes, memory_nodes());
    return memory;
  }
  if (!several_nodes || plan.nodes.size() == 1) return allocate(bytes);
  const int64_t page = placement_page(layout, plan.node_workers);
  void* memory = allocate(bytes, page);
  const std::vector<Extent> extents = plan_placement(layout, plan.node_workers, page);
  for_each_index(pool, static_cast<int64_t>(extents.size()), [&](int64_t index, int) {
    touch_on_node(memory, extents[index], plan.nodes[extents[index].node]);
  });
  return memory;
}

}  // namespace lk

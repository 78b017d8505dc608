#include "lk/testing/simulated_calls.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "lk/moe.h"
#include "lk/rows.h"

namespace lk::simulation {
namespace {

// What the kernels, which are plain functions, know of the simulation.
struct Running {
  LayerSpec layer;
  const ThreadPool* pool = nullptr;
  double bytes_of_a_weight = 0;
  Call call;
};
Running running;

// Which node owns the rows of a tile.
int node_of(const Matrix& matrix, const char* tile) {
  const int64_t row = (tile - matrix.weights) / matrix.row_bytes % matrix.rows;
  const std::vector<int>& workers = running.pool->plan().node_workers;
  int node = 0;
  while (row >= first_row(matrix.rows, workers, node + 1)) ++node;
  return node;
}

void matmul(const MatmulArgs& args) {
  const bool down = args.tile >= running.layer.w2.weights;
  const int node = node_of(down ? running.layer.w2 : running.layer.w13, args.tile);
  const auto bytes =
      static_cast<int64_t>(static_cast<double>(args.rows * args.k) * running.bytes_of_a_weight);
  ++running.call.tiles;
  running.call.bytes += bytes;
  if (node != running.pool->plan().workers[this_thread()].node) ++running.call.stolen;
  read_memory(node, bytes);
}

// A thread has about ten cache lines on their way at a time.
constexpr int64_t kLinesAtOnce = 10;

void pack(const float*, int64_t n, int64_t, int64_t, int, void*) { work(n / 16); }
bool combine(const float*, int64_t, const float*, const int32_t*, int topk, int64_t n, Scalar,
             void*) {
  // The experts' outputs are in the caches of the cores that computed them.
  work(topk * n * static_cast<int64_t>(sizeof(float)) / 64 * 150 / kLinesAtOnce);
  return true;
}

Kernels kernels() {
  Kernels none{};
  none.isa = "none";
  for (FormatKernels& format : none.formats) {
    format = {"none", "none", nullptr, kActBlockLog2, kActBlockLog2, [](int64_t k) { return k; },
              pack,   matmul};
  }
  none.widen = [](const void*, Scalar, int64_t, float*) {};
  none.finish = [](const Sums&, int64_t, bool, float*) {};
  none.end_stream = [] {};
  none.activate = [](const ActivationSpec&, const Sums&, const Sums&, int64_t, float*) {};
  none.combine = combine;
  return none;
}

// Weights that nobody reads: only their addresses count.
LayerSpec layer_of(const Calls& calls) {
  LayerSpec layer;
  layer.w13.format = layer.w2.format = calls.bits == 4 ? Format::kInt4 : Format::kFp8;
  layer.experts = calls.experts;
  layer.hidden = calls.hidden;
  layer.intermediate = calls.intermediate;
  layer.w13.parts = 2;
  layer.w13.rows = calls.intermediate;
  layer.w13.k = calls.hidden;
  layer.w2.rows = calls.hidden;
  layer.w2.k = calls.intermediate;
  char* address = reinterpret_cast<char*>(int64_t{1} << 40);
  for (Matrix* matrix : {&layer.w13, &layer.w2}) {
    matrix->row_bytes = matrix->k * calls.bits / 8;
    matrix->weights = address;
    address += calls.experts * matrix->parts * matrix->rows * matrix->row_bytes;
  }
  return layer;
}

// The experts of each token: topk different ones, the same in each run.
std::vector<int32_t> route(const Calls& calls) {
  std::mt19937 random(1);
  std::vector<int32_t> experts(calls.experts);
  std::iota(experts.begin(), experts.end(), 0);
  std::vector<int32_t> ids;
  for (int64_t token = 0; token < calls.tokens; ++token) {
    std::shuffle(experts.begin(), experts.end(), random);
    ids.insert(ids.end(), experts.begin(), experts.begin() + calls.topk);
  }
  return ids;
}

}  // namespace

Result simulate(const Calls& calls) {
  const Topology topology = parse_topology(calls.topology);
  const PoolPlan plan = plan_pool(topology, calls.pool);
  std::vector<int> nodes;
  for (const Worker& worker : plan.workers) nodes.push_back(worker.node);
  Costs costs;
  costs.node_rate = calls.machine_rate / static_cast<double>(plan.nodes.size());
  start(nodes, calls.sockets, costs);

  Result result;
  result.workers = static_cast<int>(plan.workers.size());
  result.nodes = static_cast<int>(plan.nodes.size());
  {
    ThreadPool pool(topology, calls.pool);
    Workspace workspace;
    const Kernels none = kernels();
    running = {layer_of(calls), &pool, calls.bits / 8.0 * (1 + calls.scale_bytes), {}};
    const std::vector<int32_t> ids = route(calls);
    const std::vector<float> weights(ids.size(), 1.0f);
    std::vector<uint16_t> x(calls.tokens * calls.hidden), y(x.size());
    Batch batch;
    batch.tokens = calls.tokens;
    batch.topk = calls.topk;
    batch.x = x.data();
    batch.x_stride = calls.hidden;
    batch.ids = ids.data();
    batch.weights = weights.data();
    batch.y = y.data();
    for (size_t call = 0; call <= calls.gaps.size(); ++call) {
      if (call != 0) pause(calls.gaps[call - 1]);
      running.call = {};
      const int64_t began = now();
      expert_block(running.layer, batch, none, pool, workspace);
      running.call.ns = now() - began;
      running.call.counts = take_counts();
      result.calls.push_back(running.call);
    }
    pause(calls.idle);
    result.asleep = asleep();
    result.after = take_counts();
  }
  stop();
  return result;
}

}  // namespace lk::simulation

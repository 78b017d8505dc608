#include "lk/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "lk/testing/random_layers.h"

namespace lk {
namespace {

EngineOptions on(const std::string& topology) {
  EngineOptions options;
  options.topology = topology;
  return options;
}

TEST(Configure, RefusesMoreNodesThanTheEngineDividesWorkAmong) {
  configure(on("64 nodes x 1 cores x 1 threads"));
  EXPECT_EQ(engine_info().plan.nodes.size(), 64u);
  try {
    configure(on("65 nodes x 1 cores x 1 threads"));
    ADD_FAILURE();
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(),
                 "the 65 threads are on 65 NUMA nodes, must be on 1 to 64: give the engine fewer "
                 "threads or the CPUs of fewer nodes");
  }
  EXPECT_EQ(engine_info().plan.nodes.size(), 64u);  // nothing has changed
  // Nodes without threads do not count.
  EngineOptions fewer = on("65 nodes x 1 cores x 1 threads");
  fewer.pool.threads = 64;
  configure(fewer);
  EXPECT_EQ(engine_info().plan.nodes.size(), 64u);
  configure({});
}

TEST(Reserve, RefusesSizesThatNoBatchHas) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  test_values::Random random(3);
  test_values::TestLayer layer({}, 2, 64, 32, random);
  const int64_t handle = create_layer(layer.spec);
  for (const auto& [tokens, topk] : std::vector<std::pair<int64_t, int64_t>>{
           {-1, 2}, {2, -1}, {kMost, 2}, {2, kMost}, {-kMost, -kMost}}) {
    EXPECT_THROW(reserve(handle, tokens, topk), std::invalid_argument) << tokens << " " << topk;
  }
  reserve(handle, 1 << 20, 2);
  destroy_layer(handle);
}

TEST(Counters, AddUpWhatTheCallsOfALayerDid) {
  using namespace test_values;
  configure(on("2 nodes x 2,1 cores x 1 threads"));
  Random random(7);
  TestLayer layer(kKinds[0], 5, 130, 70, random);
  TestLayer other(kKinds[0], 5, 130, 70, random);
  const int64_t handle = create_layer(layer.spec);
  const int64_t uncounted = create_layer(other.spec);
  constexpr int64_t kFields = sizeof(LayerCounters) / sizeof(int64_t);
  std::vector<int64_t> memory(kFields + 5);
  EXPECT_THROW(count(handle, memory.data(), kFields + 4), std::invalid_argument);
  EXPECT_THROW(count(-1, memory.data(), kFields + 5), std::invalid_argument);
  count(handle, memory.data(), kFields + 5);
  auto& counters = *reinterpret_cast<LayerCounters*>(memory.data());

  TestBatch batch(kKinds[0], layer, 9, 2, random);
  std::vector<int64_t> routed(5);
  for (int32_t id : batch.ids) {
    if (id >= 0) ++routed[id];
  }
  const int64_t active = 5 - std::count(routed.begin(), routed.end(), 0);
  run_layer(handle, batch.batch, layer.spec.hidden);
  run_layer(uncounted, batch.batch, layer.spec.hidden);
  batch.batch.reason = Reason::kGraph;
  run_layer(handle, batch.batch, layer.spec.hidden);
  run_layer(handle, batch.batch, layer.spec.hidden);
  EXPECT_EQ(counters.of[0].calls, 1);
  EXPECT_EQ(counters.of[0].tokens, 9);
  EXPECT_GT(counters.of[0].nanoseconds, 0);
  const auto& graph = counters.of[static_cast<int>(Reason::kGraph)];
  EXPECT_EQ(graph.calls, 2);
  EXPECT_EQ(graph.tokens, 18);
  EXPECT_EQ(counters.reads, 3 * active);
  EXPECT_EQ(std::accumulate(counters.passes, counters.passes + kSizes, int64_t{0}), 3);
  for (int expert = 0; expert < 5; ++expert) {
    EXPECT_EQ(counters.tokens_of_experts()[expert], 3 * routed[expert]) << expert;
  }

  // A call that fails is not counted, and neither is one after the end.
  batch.ids[0] = 5;
  EXPECT_THROW(run_layer(handle, batch.batch, layer.spec.hidden), std::invalid_argument);
  batch.ids[0] = 0;
  count(handle, nullptr, 0);
  run_layer(handle, batch.batch, layer.spec.hidden);
  EXPECT_EQ(graph.calls, 2);
  EXPECT_EQ(counters.of[0].calls, 1);
  destroy_layer(uncounted);
  destroy_layer(handle);
  configure({});
}

TEST(Counters, TellHowLongACallWaitedForAnother) {
  using namespace test_values;
  configure(on("1 nodes x 2 cores x 1 threads"));
  Random random(8);
  TestLayer layer(kKinds[0], 4, 128, 128, random);
  const int64_t handle = create_layer(layer.spec);
  std::vector<int64_t> memory(sizeof(LayerCounters) / sizeof(int64_t) + 4);
  count(handle, memory.data(), static_cast<int64_t>(memory.size()));
  auto& counters = *reinterpret_cast<LayerCounters*>(memory.data());
  const auto call = [&] {
    Random own(9);
    TestBatch batch(kKinds[0], layer, 64, 2, own);
    for (int turn = 0; turn < 200; ++turn) run_layer(handle, batch.batch, layer.spec.hidden);
  };
  call();
  EXPECT_EQ(counters.waited, 0);
  std::thread first(call), second(call);
  first.join();
  second.join();
  EXPECT_GT(counters.waited, 0);
  EXPECT_EQ(counters.of[0].calls, 600);
  destroy_layer(handle);
  configure({});
}

TEST(Counters, SortPassesByTheNumberOfTheirExperts) {
  LayerCounters counters{};
  for (int64_t experts : {0, 1, 2, 3, 4, 5, 8, 9, 1 << 20}) counters.add_pass(experts);
  EXPECT_EQ(counters.passes[0], 2);
  EXPECT_EQ(counters.passes[1], 1);
  EXPECT_EQ(counters.passes[2], 2);
  EXPECT_EQ(counters.passes[3], 2);
  EXPECT_EQ(counters.passes[4], 1);
  EXPECT_EQ(counters.passes[kSizes - 1], 1);
  EXPECT_EQ(counters.reads, (1 << 20) + 32);
}

}  // namespace
}  // namespace lk

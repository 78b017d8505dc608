#include "lk/deferral.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "lk/engine.h"
#include "lk/testing/allocation_counter.h"
#include "lk/testing/random_layers.h"
#include "lk/testing/reference_block.h"

namespace lk {
namespace {

using namespace test_values;

constexpr int64_t kExperts = 6, kHidden = 130, kIntermediate = 70, kTopk = 5, kMost = 9;

const Kind& kind_named(const std::string& name) {
  return *std::find_if(std::begin(kKinds), std::end(kKinds),
                       [&](const Kind& kind) { return kind.name == name; });
}

struct Divided {
  std::vector<int32_t> now, later;
};

// The rule, by sorting: of a token's experts from the heaviest to the lightest, and from the first
// slot to the last among equal ones, the last `experts` are deferred, but never the first one.
Divided divided(const TestBatch& test, int64_t experts) {
  Divided found{test.ids, std::vector<int32_t>(test.ids.size(), -1)};
  for (int64_t token = 0; token < test.batch.tokens; ++token) {
    std::vector<int64_t> slots;
    for (int64_t slot = token * kTopk; slot < (token + 1) * kTopk; ++slot) {
      if (test.ids[slot] >= 0) slots.push_back(slot);
    }
    std::stable_sort(slots.begin(), slots.end(), [&](int64_t one, int64_t other) {
      return test.weights[one] > test.weights[other];
    });
    for (int64_t n = 0; n < experts && slots.size() > 1; ++n, slots.pop_back()) {
      std::swap(found.now[slots.back()], found.later[slots.back()]);
    }
  }
  return found;
}

// Layers of one model, called in memory that all of them share.
class Model {
 public:
  Model(const Kind& kind, int layers, Random& random) : kind_(kind), random_(random) {
    for (int i = 0; i < layers; ++i) {
      layers_.emplace_back(kind, kExperts, kHidden, kIntermediate, random);
      handles.push_back(create_layer(layers_.back().spec));
      reserve(handles.back(), kMost, kTopk);
    }
  }
  ~Model() {
    for (int64_t handle : handles) destroy_layer(handle);
  }

  // Random batches for a pass. Half of the weights are equal, and some tokens have no expert.
  std::deque<TestBatch> batches(int64_t tokens) {
    std::deque<TestBatch> made;
    for (const TestLayer& layer : layers_) {
      TestBatch& test = made.emplace_back(kind_, layer, tokens, kTopk, random_);
      for (float& weight : test.weights) weight = random_below(random_, 2) ? weight : 1.0f;
      if (tokens > 2) std::fill_n(test.ids.begin() + kTopk, kTopk, -1);
    }
    return made;
  }

  // Calls a layer, and overwrites its arguments at once, as the next layer does.
  std::vector<uint16_t> call(Deferral* deferral, size_t layer, const TestBatch& test) {
    return call(deferral, layer, test, layer == 0, layer + 1 == handles.size());
  }
  std::vector<uint16_t> call(Deferral* deferral, size_t layer, const TestBatch& test, bool first,
                             bool last) {
    x_ = test.x;
    ids_ = test.ids;
    weights_ = test.weights;
    y_.assign(x_.size(), 0x1234);
    HostCall call;
    call.layer = handles[layer];
    call.hidden = kHidden;
    call.batch = test.batch;
    call.batch.x = x_.data();
    call.batch.ids = ids_.data();
    call.batch.weights = weights_.data();
    call.batch.y = y_.data();
    call.deferral = deferral;
    call.first = first;
    call.last = last;
    lk_run_host_call(&call);
    std::fill(x_.begin(), x_.end(), 0x7fff);
    std::fill(ids_.begin(), ids_.end(), 99);
    std::fill(weights_.begin(), weights_.end(), NAN);
    return y_;
  }

  // The engine's result for some of a batch's experts.
  std::vector<uint16_t> direct(size_t layer, const TestBatch& test,
                               const std::vector<int32_t>& ids) const {
    std::vector<uint16_t> y(test.x.size());
    Batch batch = test.batch;
    batch.ids = ids.data();
    batch.y = y.data();
    run_layer(handles[layer], batch, kHidden);
    return y;
  }

  std::vector<double> reference(size_t layer, const TestBatch& test,
                                const std::vector<int32_t>& ids) const {
    return test_values::reference(layers_[layer], test, ids);
  }

  std::vector<int64_t> handles;

 private:
  const Kind& kind_;
  Random& random_;
  std::deque<TestLayer> layers_;
  std::vector<uint16_t> x_, y_;
  std::vector<int32_t> ids_;
  std::vector<float> weights_;
};

bool all_nan(const std::vector<uint16_t>& y) {
  return std::all_of(y.begin(), y.end(),
                     [](uint16_t value) { return std::isnan(bf16_to_float(value)); });
}

class Deferrals : public testing::Test {
 protected:
  void SetUp() override {
    EngineOptions options;
    options.topology = "2 nodes x 2,1 cores x 1 threads";
    configure(options);
    take_host_call_error();
  }
  void TearDown() override { EXPECT_EQ(take_host_call_error().layer, 0); }
  static void TearDownTestSuite() { configure({}); }

  Random random_{31};
};

TEST_F(Deferrals, MatchTheReferenceLayerByLayer) {
  for (const char* name : {"bf16_biases", "bf16_weight_on_input", "fp16", "int4"}) {
    const Kind& kind = kind_named(name);
    Model model(kind, 3, random_);
    for (int64_t experts : {1, 2, 4}) {
      Deferral deferral(experts, kMost, kHidden, kTopk);
      for (int64_t tokens : {3, 1, 9, 0}) {
        const std::deque<TestBatch> batches = model.batches(tokens);
        std::vector<double> later(tokens * kHidden, 0.0);
        for (size_t layer = 0; layer < batches.size(); ++layer) {
          const TestBatch& test = batches[layer];
          const bool last = layer + 1 == batches.size();
          const Divided ids = divided(test, last ? 0 : experts);
          std::vector<double> want = model.reference(layer, test, ids.now);
          std::transform(want.begin(), want.end(), later.begin(), want.begin(), std::plus<>());
          later = model.reference(layer, test, ids.later);
          const std::vector<uint16_t> y = model.call(&deferral, layer, test);
          double squares = 0, error_squares = 0;
          for (size_t i = 0; i < want.size(); ++i) {
            const double error = widen(kind.type, y[i]) - want[i];
            squares += want[i] * want[i];
            error_squares += error * error;
          }
          // The bound of a layer in moe_test.cpp, 4e-3, is mostly that of rounding y to bf16. Here
          // both parts are rounded, and then their sum.
          EXPECT_LE(std::sqrt(error_squares), 6e-3 * std::sqrt(squares))
              << name << ", " << experts << " of " << tokens << " tokens, layer " << layer;
        }
      }
    }
  }
}

TEST_F(Deferrals, BeginAnewAfterAPassThatWasGivenUp) {
  Model model(kind_named("bf16"), 3, random_);
  Deferral deferral(2, kMost, kHidden, kTopk);
  const std::deque<TestBatch> given_up = model.batches(4);
  for (size_t ends_after : {1, 2}) {
    for (bool other_calls : {false, true}) {
      for (size_t layer = 0; layer < ends_after; ++layer) {
        model.call(&deferral, layer, given_up[layer]);
      }
      const std::deque<TestBatch> batches = model.batches(7);
      if (other_calls) {
        // A longer batch defers nothing, and gets nothing.
        EXPECT_EQ(model.call(nullptr, 1, batches[1]), model.direct(1, batches[1], batches[1].ids));
      }
      const Divided ids = divided(batches[0], 2);
      EXPECT_EQ(model.call(&deferral, 0, batches[0]), model.direct(0, batches[0], ids.now));
      model.call(&deferral, 1, batches[1]);
      model.call(&deferral, 2, batches[2]);
    }
  }
}

TEST_F(Deferrals, OfOneLayerAreNone) {
  Model model(kind_named("fp8_row_scales"), 1, random_);
  Deferral deferral(4, kMost, kHidden, kTopk);
  for (int turn = 0; turn < 3; ++turn) {
    const std::deque<TestBatch> batches = model.batches(5);
    EXPECT_EQ(model.call(&deferral, 0, batches[0]), model.direct(0, batches[0], batches[0].ids));
  }
}

TEST_F(Deferrals, LeaveNaNInTheNextLayerAfterAnError) {
  Model model(kind_named("bf16"), 3, random_);
  Deferral deferral(1, kMost, kHidden, kTopk);
  std::deque<TestBatch> batches = model.batches(2);
  batches[0].ids = {0, 1, kExperts, 2, 3, 4, 4, 0, 1, 2};
  batches[0].weights = {1, 1, 0.5, 1, 1, 1, 1, 1, 1, 1};
  EXPECT_EQ(model.call(&deferral, 0, batches[0]),
            model.direct(0, batches[0], divided(batches[0], 1).now));
  EXPECT_TRUE(all_nan(model.call(&deferral, 1, batches[1])));
  EXPECT_FALSE(all_nan(model.call(&deferral, 2, batches[2])));
  HostCallError error = take_host_call_error();
  EXPECT_EQ(error.layer, model.handles[0]);
  EXPECT_NE(error.text.find("topk_ids[0, 2] is 6"), std::string::npos) << error.text;

  // An error in a layer itself: the layer after it gets nothing, since nothing was deferred.
  std::fill(batches[0].weights.begin(), batches[0].weights.end(), 1.0f);
  EXPECT_TRUE(all_nan(model.call(&deferral, 0, batches[0])));
  EXPECT_EQ(model.call(&deferral, 2, batches[2]), model.direct(2, batches[2], batches[2].ids));
  EXPECT_EQ(take_host_call_error().layer, model.handles[0]);
}

TEST_F(Deferrals, RefuseBatchesThatDoNotFit) {
  Model model(kind_named("bf16"), 2, random_);
  Deferral deferral(1, kMost, kHidden, kTopk);
  const std::deque<TestBatch> two = model.batches(2), three = model.batches(3),
                              ten = model.batches(10);
  model.call(&deferral, 0, two[0]);
  EXPECT_TRUE(all_nan(model.call(&deferral, 1, three[1])));
  EXPECT_NE(take_host_call_error().text.find("3 tokens of 130 elements, but the layer before has "
                                             "deferred experts of 2 tokens"),
            std::string::npos);
  EXPECT_TRUE(all_nan(model.call(&deferral, 0, ten[0])));
  EXPECT_NE(take_host_call_error().text.find("10 tokens"), std::string::npos);
}

TEST_F(Deferrals, CountAsCallsOfTheirOwnAndTheirTokensOnce) {
  Model model(kind_named("bf16"), 2, random_);
  Deferral deferral(2, kMost, kHidden, kTopk);
  std::vector<int64_t> numbers(sizeof(LayerCounters) / sizeof(int64_t) + kExperts);
  count(model.handles[0], numbers.data(), static_cast<int64_t>(numbers.size()));
  std::deque<TestBatch> batches = model.batches(6);
  const auto run = [&] {
    const HostCallProgress before = host_call_progress();
    for (size_t layer : {0, 1}) model.call(&deferral, layer, batches[layer]);
    const HostCallProgress after = host_call_progress();
    EXPECT_EQ(after.begun, after.ended);
    EXPECT_EQ(after.layer, model.handles[1]);
    return after.begun - before.begun;
  };
  EXPECT_EQ(run(), 3);
  const auto* counters = reinterpret_cast<LayerCounters*>(numbers.data());
  EXPECT_EQ(counters->of[0].calls, 1);
  EXPECT_EQ(counters->of[0].tokens, 6);
  const auto skipped = std::count(batches[0].ids.begin(), batches[0].ids.end(), -1);
  EXPECT_EQ(std::accumulate(numbers.end() - kExperts, numbers.end(), int64_t{0}),
            6 * kTopk - skipped);
  // Rows that are padding have nothing to defer, and a single expert is not deferred.
  std::fill(batches[0].ids.begin(), batches[0].ids.end(), -1);
  for (int64_t token : {1, 4}) batches[0].ids[token * kTopk + 3] = 2;
  EXPECT_EQ(run(), 2);
  count(model.handles[0], nullptr, 0);
}

TEST_F(Deferrals, NameTheLayerThatIsWaitedFor) {
  const Kind& kind = kind_named("bf16");
  // The deferred experts of the first layer take some milliseconds.
  constexpr int64_t kTokens = 400, kWide = 512;
  TestLayer slow(kind, 2, kWide, 512, random_), quick(kind, 2, kWide, 64, random_);
  TestBatch batch(kind, slow, kTokens, 2, random_);
  Deferral deferral(1, kTokens, kWide, 2);
  HostCall calls[2];
  for (HostCall& call : calls) {
    call.hidden = kWide;
    call.batch = batch.batch;
    call.deferral = &deferral;
  }
  calls[0].layer = create_layer(slow.spec);
  calls[1].layer = create_layer(quick.spec);
  calls[0].first = calls[1].last = true;
  bool seen = false;
  for (int turn = 0; turn < 100 && !seen; ++turn) {
    lk_run_host_call(&calls[0]);
    std::thread driver(lk_run_host_call, static_cast<void*>(&calls[1]));
    while (calls[1].ended <= turn) {
      const HostCallProgress now = host_call_progress();
      // As long as two are under way, the second call waits for the first one's experts.
      if (now.begun - now.ended < 2 || host_call_progress().ended != now.ended) continue;
      EXPECT_EQ(now.layer, calls[0].layer);
      seen = true;
    }
    driver.join();
  }
  EXPECT_TRUE(seen);
  for (const HostCall& call : calls) destroy_layer(call.layer);
}

TEST_F(Deferrals, AllocateNothing) {
  if (!counts_allocations()) GTEST_SKIP() << "operator new is the sanitizer's";
  Model model(kind_named("bf16"), 2, random_);
  Deferral deferral(2, kMost, kHidden, kTopk);
  const std::deque<TestBatch> batches = model.batches(kMost);
  HostCall calls[2];
  std::vector<uint16_t> y(kMost * kHidden);
  for (int layer : {0, 1}) {
    calls[layer].layer = model.handles[layer];
    calls[layer].hidden = kHidden;
    calls[layer].batch = batches[layer].batch;
    calls[layer].batch.y = y.data();
    calls[layer].deferral = &deferral;
  }
  calls[0].first = calls[1].last = true;
  const int64_t started = allocations();
  for (int turn = 0; turn < 50; ++turn) {
    for (HostCall& call : calls) lk_run_host_call(&call);
  }
  EXPECT_EQ(allocations(), started);
}

}  // namespace
}  // namespace lk

// Random layers, batches and numbers. LK_FUZZ_SECONDS says for how long; LK_FUZZ_SEED repeats the
// one round that a failure names. Under sanitizers (`build_tools.engine test asan`) each access
// outside an array and each overflow of a number is a failure, too.
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "lk/engine.h"
#include "lk/host_call.h"
#include "lk/testing/random_layers.h"
#include "lk/testing/reference_block.h"

// Of the sanitizers' runtime, which ends the process without a word of the test's.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

namespace lk {
namespace {

using namespace test_values;

uint32_t current_seed = 0;

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();
constexpr int64_t kOddNumbers[] = {
    kLeast,  -kMost,           -(int64_t{1} << 40), -2,        -1,        0,    1, 3,
    1 << 16, int64_t{1} << 31, int64_t{1} << 40,    kMost / 2, kMost - 1, kMost};

template <class List>
auto& one_of(List& list, Random& random) {
  return list[random_below(random, static_cast<uint32_t>(std::size(list)))];
}

// Small numbers are as likely as large ones.
int64_t random_size(int64_t most, Random& random) {
  const double log = std::uniform_real_distribution<>(0, std::log(most + 1.0))(random);
  return std::clamp<int64_t>(static_cast<int64_t>(std::exp(log)), 1, most);
}

bool random_flag(Random& random) { return random_below(random, 2) == 1; }

// A kind of the list, with some of what a checkpoint may combine differently.
Kind random_kind(Random& random) {
  Kind kind = one_of(kKinds, random);
  kind.weight_on_input = random_flag(random);
  kind.type = random_flag(random) ? Scalar::kBf16 : Scalar::kFp16;
  kind.w13.bias = random_flag(random);
  kind.w2.bias = random_flag(random);
  if (is_int4(kind.format)) {
    constexpr int64_t kGroups[] = {32, 64, 128};
    constexpr ScaleType kTypes[] = {ScaleType::kBf16, ScaleType::kFp16, ScaleType::kFloat};
    kind.w13.group = kind.w2.group = one_of(kGroups, random);
    kind.w13.scale_type = kind.w2.scale_type = one_of(kTypes, random);
  }
  return kind;
}

// Calls `function`, which may refuse its arguments.
bool refused(const std::function<void()>& function) {
  try {
    function();
    return false;
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()), "");
  } catch (const OutOfMemory& error) {
    EXPECT_NE(std::string(error.what()), "");
  }
  return true;
}

// The layer of a round in the engine.
class Created {
 public:
  explicit Created(const LayerSpec& spec) : spec_(spec), handle_(create_layer(spec)) {}
  ~Created() { destroy_layer(handle_); }
  Created(const Created&) = delete;
  Created& operator=(const Created&) = delete;

  int64_t handle() const { return handle_; }
  void run(const Batch& batch) const { run_layer(handle_, batch, spec_.hidden); }

 private:
  const LayerSpec& spec_;
  const int64_t handle_;
};

void configure_randomly(Random& random) {
  const std::vector<std::string> isas = available_kernels();
  constexpr const char* kTopologies[] = {"1 node x 1 cores x 1 threads",
                                         "2 nodes x 2,1 cores x 1 threads",
                                         "3 nodes x 1 cores x 2 threads"};
  EngineOptions options;
  options.isa = one_of(isas, random);
  options.topology = one_of(kTopologies, random);
  configure(options);
}

void check_results(const Kind& kind, const TestLayer& layer, const TestBatch& test) {
  const std::vector<double> want = reference(layer, test, test.ids);
  double squares = 0;
  for (double value : want) squares += value * value;
  const double size = std::sqrt(squares / std::max<double>(1, static_cast<double>(want.size())));
  // As in moe_test.cpp, but few numbers do not average out: 4 instead of 1 times the bound.
  const double bound = 4 * (is_act8(kind.format) ? 2e-2 : 4e-3);
  for (size_t i = 0; i < want.size(); ++i) {
    const int64_t token = static_cast<int64_t>(i) / layer.spec.hidden;
    // Where float16 ends, y may be infinite.
    if (kind.type == Scalar::kFp16 && std::abs(want[i]) > 60000) continue;
    // The sums of w13 have a size of 1, and those of w2 that of a row of w2, whatever cancels.
    double most = size;
    for (int64_t j = 0; j < test.batch.topk; ++j) {
      most = std::max<double>(most, test.weights[token * test.batch.topk + j] * layer.w2.size);
    }
    ASSERT_NEAR(widen(kind.type, test.y[i]), want[i], bound * (6 * most + std::abs(want[i])))
        << "element " << i;
  }
}

// Ids, handles and lengths that are wrong are refused, and leave nothing behind.
void check_refusals(const TestLayer& layer, const Created& created, TestBatch& test,
                    Random& random) {
  const LayerSpec& spec = layer.spec;
  for (const int64_t number : kOddNumbers) {
    EXPECT_TRUE(number == created.handle() ||
                refused([&] { run_layer(number, test.batch, spec.hidden); }));
    EXPECT_TRUE(number == spec.hidden ||
                refused([&] { run_layer(created.handle(), test.batch, number); }));
    EXPECT_TRUE(refused([&] { run_linear(created.handle(), {}, number, number); }) ||
                created.handle() == number);
    int64_t counters = 0;
    EXPECT_TRUE(refused([&] { count(created.handle(), &counters, -std::abs(number / 2) - 1); }));
  }
  if (test.ids.empty()) return;
  std::vector<int64_t> ids(test.ids.begin(), test.ids.end());
  const int64_t wrong = one_of(kOddNumbers, random);
  one_of(ids, random) = wrong;
  Batch batch = test.batch;
  batch.ids64 = ids.data();
  const bool allowed = wrong >= -1 && wrong < spec.experts;
  EXPECT_EQ(refused([&] { created.run(batch); }), !allowed) << wrong;
  // In a driver's thread, the result of a call that is refused is NaN.
  HostCall call;
  call.layer = created.handle();
  call.hidden = spec.hidden;
  call.batch = batch;
  lk_run_host_call(&call);
  EXPECT_EQ(take_host_call_error().text.empty(), allowed);
  if (!allowed) {
    for (const uint16_t value : test.y) EXPECT_TRUE(std::isnan(widen(batch.type, value)));
  }
}

// Whatever bytes the weights, scales and tokens have, the log has the rows that are not finite.
void check_any_bytes(const Kind& kind, TestLayer& layer, TestBatch& test, Random& random) {
  const auto fill = [&](auto& array) {
    if (random_below(random, 4) == 0) return;
    for (auto& value : array) {
      uint32_t bits = random();
      if (random_below(random, 8) == 0) bits |= 0x7f807f80;
      std::memcpy(&value, &bits, sizeof(value));
    }
  };
  for (MatrixData* data : {&layer.w13.data, &layer.w2.data}) {
    fill(data->weights), fill(data->scale), fill(data->row_scale), fill(data->part_scale);
    fill(data->bias);
  }
  fill(test.x), fill(test.weights);
  std::vector<LoggedFault> log(test.batch.tokens + 2);
  watch(log.data(), test.batch.tokens);
  {
    const Created created(layer.spec);
    created.run(test.batch);
  }
  watch(nullptr, 0);
  int64_t faults = 0;
  for (int64_t token = 0; token < test.batch.tokens; ++token) {
    bool finite = true;
    for (int64_t i = 0; i < layer.spec.hidden; ++i) {
      finite &= std::isfinite(widen(kind.type, test.y[token * layer.spec.hidden + i]));
    }
    faults += !finite;
    EXPECT_EQ(log[1 + token].layer == 0, finite) << "token " << token;
  }
  EXPECT_EQ(log[0].layer, faults);
}

// Numbers that describe machines and memory, and no layer.
void check_numbers(Random& random) {
  constexpr const char* kPieces[] = {"0",    "1",       "2",  "9999", "2147483647", "4294967296",
                                     "-",    ",",       " ",  "x",    " nodes x ",  " cores x ",
                                     "999 ", "threads", "\n", ""};
  std::string text;
  for (uint32_t n = random_below(random, 8); n > 0; --n) text += one_of(kPieces, random);
  refused([&] { parse_cpu_list(text); });
  refused([&] { parse_topology(text); });
  const RowLayout layout{one_of(kOddNumbers, random), one_of(kOddNumbers, random),
                         one_of(kOddNumbers, random), one_of(kOddNumbers, random)};
  refused([&] { release(allocate_bank(layout)); });
}

void run_round(uint32_t seed) {
  SCOPED_TRACE(testing::Message() << "LK_FUZZ_SEED=" << seed << " repeats this round");
  Random random(seed);
  configure_randomly(random);
  const Kind kind = random_kind(random);
  // Rows end within a unit of four bytes, within a block of 32 activations, or within a tile.
  const int64_t unit = code_bits(kind.format) == 4 ? 2 : 1;
  const int64_t hidden = unit * random_size(300 / unit, random);
  const int64_t intermediate = unit * random_size(200 / unit, random);
  const int64_t experts = random_size(6, random);
  const int64_t tokens = random_size(40, random) - 1;
  const int64_t topk = random_below(random, 5);
  SCOPED_TRACE(testing::Message() << kind.name << " " << experts << " x " << hidden << " x "
                                  << intermediate << ", " << tokens << " x " << topk);
  TestLayer layer(kind, experts, hidden, intermediate, random);
  TestBatch test(kind, layer, tokens, topk, random);
  const MatrixData w13 = layer.w13.data, w2 = layer.w2.data;
  const MatrixData w3 = layer.w3 ? layer.w3->data : MatrixData();
  {
    const Created created(layer.spec);
    reserve(created.handle(), tokens, topk);
    created.run(test.batch);
    check_results(kind, layer, test);
    check_refusals(layer, created, test, random);
    const int64_t odd[] = {one_of(kOddNumbers, random), one_of(kOddNumbers, random)};
    refused([&] { reserve(created.handle(), odd[0], odd[1]); });
  }
  {
    const int64_t handle = create_layer({layer.spec}, /*ordered=*/true);
    restore_layer(handle);
    EXPECT_TRUE(layer.w13.data == w13 && layer.w2.data == w2) << "restored";
    EXPECT_TRUE(!layer.w3 || layer.w3->data == w3) << "restored";
    EXPECT_TRUE(refused([&] { restore_layer(handle); }));
  }
  check_any_bytes(kind, layer, test, random);
  check_numbers(random);
}

TEST(Fuzz, AnythingIsComputedOrRefused) {
  const char* seconds = std::getenv("LK_FUZZ_SECONDS");
  const char* only = std::getenv("LK_FUZZ_SEED");
  if (only != nullptr) return run_round(static_cast<uint32_t>(std::strtoul(only, nullptr, 10)));
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::seconds(seconds ? std::atoi(seconds) : 2);
  std::random_device device;
  int64_t rounds = 0;
  if (__sanitizer_set_death_callback != nullptr) {
    __sanitizer_set_death_callback(
        [] { std::cerr << "LK_FUZZ_SEED=" << current_seed << " repeats this round\n"; });
  }
  do {
    current_seed = device();
    run_round(current_seed);
    ++rounds;
  } while (!HasFailure() && Clock::now() < end);
  std::cout << "lk: " << rounds << " rounds\n";
}

}  // namespace
}  // namespace lk

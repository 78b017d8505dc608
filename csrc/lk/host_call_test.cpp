#include "lk/host_call.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "lk/engine.h"
#include "lk/testing/allocation_counter.h"
#include "lk/testing/random_layers.h"

namespace lk {
namespace {

using namespace test_values;

// Stands for a driver's stream: a thread that knows nothing of the engine calls functions in order.
class Stream {
 public:
  ~Stream() {
    queue(nullptr, nullptr);
    thread_.join();
  }
  void queue(void (*function)(void*), void* argument) {
    const std::lock_guard lock(mutex_);
    queue_.push_back({function, argument});
    changed_.notify_all();
  }
  void synchronize() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return queue_.empty(); });
  }

 private:
  struct Item {
    void (*function)(void*);
    void* argument;
  };
  void work() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return !queue_.empty(); });
      const Item item = queue_.front();
      if (item.function == nullptr) return;
      lock.unlock();
      item.function(item.argument);
      lock.lock();
      queue_.pop_front();
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> queue_;
  std::thread thread_{[this] { work(); }};
};

class HostCalls : public testing::Test {
 protected:
  void SetUp() override {
    EngineOptions options;
    options.topology = "2 nodes x 2,1 cores x 1 threads";
    configure(options);
    take_host_call_error();
  }
  static void TearDownTestSuite() { configure({}); }

  static void fill(HostCall* call, int64_t layer, const TestLayer& test, const Batch& batch) {
    call->layer = layer;
    call->hidden = test.spec.hidden;
    call->batch = batch;
  }

  Random random_{23};
};

TEST_F(HostCalls, RunInOrderAndAgainWithTheBitsOfADirectCall) {
  Stream stream;
  const Kind& first_kind = kKinds[0];
  const Kind& last_kind = *(std::end(kKinds) - 1);
  for (const Kind* kind : {&first_kind, &last_kind}) {
    TestLayer layer(*kind, 3, 130, 70, random_);
    const int64_t handle = create_layer(layer.spec);
    TestBatch batch(*kind, layer, 9, 2, random_);
    std::vector<uint16_t> want(batch.y.size());
    Batch direct = batch.batch;
    direct.y = want.data();
    run_layer(handle, direct, layer.spec.hidden);
    HostCall call;
    fill(&call, handle, layer, batch.batch);
    for (int64_t turn = 1; turn <= 200; ++turn) {
      std::fill(batch.y.begin(), batch.y.end(), uint16_t{0});
      stream.queue(lk_run_host_call, &call);
      // Reading this number must be enough to see all that the call wrote.
      while (call.ended.load(std::memory_order_acquire) != turn) std::this_thread::yield();
      ASSERT_EQ(batch.y, want) << *kind << " " << turn;
    }
    stream.synchronize();
    destroy_layer(handle);
  }
  EXPECT_EQ(take_host_call_error().layer, 0);
}

TEST_F(HostCalls, OfSeveralThreadsTakeTurns) {
  TestLayer layer(kKinds[0], 4, 96, 64, random_);
  const int64_t handle = create_layer(layer.spec);
  std::deque<TestBatch> batches;
  std::deque<HostCall> calls;
  std::vector<std::vector<uint16_t>> want;
  for (int64_t tokens : {1, 17, 5}) {
    TestBatch& batch = batches.emplace_back(kKinds[0], layer, tokens, 3, random_);
    fill(&calls.emplace_back(), handle, layer, batch.batch);
    run_layer(handle, batch.batch, layer.spec.hidden);
    want.push_back(batch.y);
    std::fill(batch.y.begin(), batch.y.end(), uint16_t{0});
  }
  const HostCallProgress before = host_call_progress();
  {
    std::deque<Stream> streams(3);
    for (int turn = 0; turn < 100; ++turn) {
      for (size_t i = 0; i < 3; ++i) streams[i].queue(lk_run_host_call, &calls[i]);
      const HostCallProgress now = host_call_progress();
      ASSERT_LE(now.ended, now.begun);
    }
    for (Stream& stream : streams) stream.synchronize();
  }
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(batches[i].y, want[i]) << i;
  const HostCallProgress after = host_call_progress();
  EXPECT_EQ(after.begun - before.begun, 300);
  EXPECT_EQ(after.ended, after.begun);
  EXPECT_EQ(after.layer, handle);
  destroy_layer(handle);
}

TEST_F(HostCalls, LeaveNaNAndTheFirstErrorsText) {
  Stream stream;
  TestLayer layer(kKinds[0], 3, 64, 64, random_);
  const int64_t handle = create_layer(layer.spec);
  TestBatch batch(kKinds[0], layer, 4, 2, random_);
  HostCall call;
  fill(&call, handle, layer, batch.batch);
  const std::vector<uint16_t> all_nan(batch.y.size(), 0xffff);

  batch.ids[5] = 3;
  std::fill(batch.y.begin(), batch.y.end(), uint16_t{0});
  stream.queue(lk_run_host_call, &call);
  stream.synchronize();
  EXPECT_EQ(batch.y, all_nan);
  batch.ids[5] = 0;
  destroy_layer(handle);
  std::fill(batch.y.begin(), batch.y.end(), uint16_t{0});
  stream.queue(lk_run_host_call, &call);
  stream.synchronize();
  EXPECT_EQ(batch.y, all_nan);
  EXPECT_EQ(call.ended, 2);

  HostCallError error = take_host_call_error();
  EXPECT_EQ(error.layer, handle);
  EXPECT_NE(error.text.find("topk_ids[2, 1] is 3"), std::string::npos) << error.text;
  EXPECT_EQ(take_host_call_error().layer, 0);
  // Once an error is taken, the next one is kept.
  stream.queue(lk_run_host_call, &call);
  stream.synchronize();
  error = take_host_call_error();
  EXPECT_EQ(error.layer, handle);
  EXPECT_NE(error.text.find("names no expert layer"), std::string::npos) << error.text;
}

TEST_F(HostCalls, NoteFaultsFromTheRowThatTheyAreOf) {
  TestLayer layer(kKinds[0], 3, 64, 64, random_);
  const int64_t handle = create_layer(layer.spec);
  TestBatch batch(kKinds[0], layer, 3, 2, random_);
  std::fill(batch.ids.begin(), batch.ids.end(), 1);
  batch.x[1 * 64 + 7] = 0x7fc0;
  HostCall call;
  fill(&call, handle, layer, batch.batch);
  call.batch.first_row = 10;
  std::vector<LoggedFault> log(20 + 2);
  watch(log.data(), 20);
  lk_run_host_call(&call);
  watch(nullptr, 0);
  EXPECT_EQ(log[0].layer, 1);
  EXPECT_EQ(log[1 + 11].layer, handle);
  destroy_layer(handle);
}

TEST_F(HostCalls, AllocateNothingForWhatIsReserved) {
  if (!counts_allocations()) GTEST_SKIP() << "operator new is the sanitizer's";
  TestLayer layer(kKinds[0], 3, 64, 64, random_);
  const int64_t handle = create_layer(layer.spec);
  TestBatch batch(kKinds[0], layer, 11, 2, random_);
  reserve(handle, 11, 2);
  HostCall call;
  fill(&call, handle, layer, batch.batch);
  std::thread driver([&] {
    const int64_t started = allocations();
    for (int turn = 0; turn < 50; ++turn) lk_run_host_call(&call);
    EXPECT_EQ(allocations(), started);
  });
  driver.join();
  EXPECT_EQ(call.ended, 50);
  destroy_layer(handle);
}

}  // namespace
}  // namespace lk

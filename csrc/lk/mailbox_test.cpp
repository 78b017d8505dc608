#include "lk/mailbox.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "lk/engine.h"
#include "lk/host_call.h"
#include "lk/testing/random_layers.h"

namespace lk {
namespace {

using namespace test_values;

class Mailboxes : public testing::Test {
 protected:
  void SetUp() override {
    EngineOptions options;
    options.topology = "2 nodes x 2,1 cores x 1 threads";
    configure(options);
  }
  static void TearDownTestSuite() { configure({}); }

  // Does what a stream of a GPU does for a call.
  static void call(MailboxWords* words, HostCall* call) {
    const auto address = reinterpret_cast<uint64_t>(call);
    words->request.store(address, std::memory_order_release);
    while (words->answer.load(std::memory_order_acquire) != address) std::this_thread::yield();
    words->answer.store(0, std::memory_order_relaxed);
  }

  Random random_{29};
  MailboxWords words_;
};

TEST_F(Mailboxes, MakeCallsInTurnsWithTheBitsOfADirectCall) {
  TestLayer layer(kKinds[0], 3, 130, 70, random_);
  const int64_t handle = create_layer(layer.spec);
  TestBatch first(kKinds[0], layer, 5, 2, random_);
  TestBatch second(kKinds[0], layer, 2, 2, random_);
  std::vector<std::vector<uint16_t>> want;
  HostCall calls[2];
  TestBatch* batches[] = {&first, &second};
  for (int i = 0; i < 2; ++i) {
    run_layer(handle, batches[i]->batch, layer.spec.hidden);
    want.push_back(batches[i]->y);
    calls[i].layer = handle;
    calls[i].hidden = layer.spec.hidden;
    calls[i].batch = batches[i]->batch;
  }
  Mailbox mailbox(&words_);
  for (int turn = 0; turn < 300; ++turn) {
    for (int i = 0; i < 2; ++i) {
      std::fill(batches[i]->y.begin(), batches[i]->y.end(), uint16_t{0});
      call(&words_, &calls[i]);
      ASSERT_EQ(batches[i]->y, want[i]) << turn;
    }
  }
  EXPECT_EQ(calls[0].ended, 300);
  EXPECT_EQ(words_.request, 0);
  destroy_layer(handle);
}

TEST_F(Mailboxes, WakeUpAfterAPause) {
  HostCall nothing;
  nothing.layer = -1;  // No layer has this handle, so the call ends with an error at once.
  Mailbox mailbox(&words_);
  std::this_thread::sleep_for(std::chrono::milliseconds(1200));
  call(&words_, &nothing);
  EXPECT_EQ(nothing.ended, 1);
  EXPECT_EQ(take_host_call_error().layer, -1);
}

TEST_F(Mailboxes, EndWithoutACall) {
  const Mailbox mailbox(&words_);
  EXPECT_EQ(words_.answer, 0);
}

}  // namespace
}  // namespace lk

// Computes some experts of a layer beside what a GPU does between this layer and the next one, and
// adds them to the next layer's result.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "lk/host_call.h"
#include "lk/wait.h"
#include "lk/workspace.h"

namespace lk {

// What the layers of a model defer. Of each token, the `experts` least weighted of its experts are
// deferred, of equal weights the later ones; at least one expert is not.
//
// The layers of a pass are called one after the other. `first` and `last` of HostCall say where a
// pass begins and ends. The first call drops what a pass that was given up has left, and the last
// one defers nothing, so that a whole pass adds each expert once.
//
// A thread of this object calls the engine, and sleeps when there is nothing to do. Its calls count
// in host_call_progress(), and their errors are those of take_host_call_error(). After an error the
// deferred result is NaN, and so is the result of the layer that it is added to.
class Deferral {
 public:
  // Allocates all memory that batches of up to so many tokens need.
  Deferral(int64_t experts, int64_t tokens, int64_t hidden, int64_t topk);
  // Waits for the thread. No call may be under way.
  ~Deferral();
  Deferral(const Deferral&) = delete;
  Deferral& operator=(const Deferral&) = delete;

  // Waits until the experts that the last call deferred are computed.
  void wait() { computing_.wait(); }

  // Computes y of the call: the experts that are not deferred, and what the layer before has
  // deferred. The latter is rounded to y's type first, and the sum once more. Calls must wait()
  // first. Throws what run_layer throws, and std::invalid_argument for a batch that is too large or
  // of another size than that of the layer before.
  void run(const HostCall& call);

 private:
  void check(const HostCall& call) const;
  bool divide(const Batch& batch);
  void hand_over(const HostCall& call);
  void serve();

  const int64_t experts_;
  const int64_t most_tokens_;
  const int64_t most_hidden_;
  const int64_t most_topk_;
  Scratch<int32_t> now_;      // [tokens, topk]: the ids that are not deferred, -1 elsewhere
  Scratch<int32_t> later_;    // [tokens, topk]: the deferred ids, -1 elsewhere
  Scratch<float> weights_;    // [tokens, topk]
  Scratch<uint16_t> x_, y_;   // [tokens, hidden]
  HostCall work_;             // the call of the deferred experts
  bool to_be_added_ = false;  // whether the next call is to add the result of `work_`
  Countdown computing_;       // 1 while `work_` is under way
  std::mutex mutex_;
  std::condition_variable changed_;
  bool given_ = false;  // whether the thread is to begin `work_`
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace lk

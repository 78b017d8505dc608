#include "lk/deferral.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "lk/engine.h"

#define LK_ISA deferral
#include "lk/kernels/float16.h"

namespace lk {
namespace {

// Adds `count` numbers to y. Both are of one type.
void add(const uint16_t* more, int64_t count, Scalar type, uint16_t* y) {
  if (type == Scalar::kBf16) {
    for (int64_t i = 0; i < count; ++i) {
      y[i] =
          deferral::float_to_bf16(deferral::bf16_to_float(y[i]) + deferral::bf16_to_float(more[i]));
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      y[i] =
          deferral::float_to_fp16(deferral::fp16_to_float(y[i]) + deferral::fp16_to_float(more[i]));
    }
  }
}

std::string size_of(int64_t tokens, int64_t hidden) {
  return std::to_string(tokens) + " tokens of " + std::to_string(hidden) + " elements";
}

}  // namespace

Deferral::Deferral(int64_t experts, int64_t tokens, int64_t hidden, int64_t topk)
    : experts_(experts), most_tokens_(tokens), most_hidden_(hidden), most_topk_(topk) {
  now_.resize(tokens * topk);
  later_.resize(tokens * topk);
  weights_.resize(tokens * topk);
  x_.resize(tokens * hidden);
  y_.resize(tokens * hidden);
  thread_ = std::thread([this] { serve(); });
}

Deferral::~Deferral() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_one();
  thread_.join();
}

void Deferral::run(const HostCall& call) {
  const bool adds = std::exchange(to_be_added_, false) && !call.first;
  check(call);
  const Batch& batch = call.batch;
  if (adds && (work_.batch.tokens != batch.tokens || work_.hidden != call.hidden ||
               work_.batch.type != batch.type)) {
    throw std::invalid_argument("the batch has " + size_of(batch.tokens, call.hidden) +
                                ", but the layer before has deferred experts of " +
                                size_of(work_.batch.tokens, work_.hidden));
  }
  Batch now = batch;
  const bool defers = !call.last && divide(batch);
  if (defers) now.ids = now_.data();
  run_layer(call.layer, now, call.hidden);
  if (adds) {
    add(y_.data(), batch.tokens * call.hidden, batch.type, static_cast<uint16_t*>(batch.y));
  }
  if (defers) hand_over(call);
}

void Deferral::check(const HostCall& call) const {
  const Batch& batch = call.batch;
  if (batch.ids64 != nullptr) throw std::invalid_argument("topk_ids must be int32 to be deferred");
  if (batch.tokens > most_tokens_ || call.hidden > most_hidden_ || batch.topk > most_topk_) {
    throw std::invalid_argument(size_of(batch.tokens, call.hidden) + " with " +
                                std::to_string(batch.topk) + " experts, memory to defer is for " +
                                size_of(most_tokens_, most_hidden_) + " with " +
                                std::to_string(most_topk_));
  }
}

// Divides the ids of a batch among `now_` and `later_`. Returns whether any are deferred.
bool Deferral::divide(const Batch& batch) {
  const int64_t slots = batch.tokens * batch.topk;
  std::copy_n(batch.ids, slots, now_.data());
  std::fill_n(later_.data(), slots, -1);
  bool any = false;
  for (int64_t begin = 0; begin < slots; begin += batch.topk) {
    int32_t* now = now_.data() + begin;
    const float* weights = batch.weights + begin;
    const int64_t skipped = std::count(now, now + batch.topk, -1);
    const int64_t deferred = std::min(experts_, batch.topk - skipped - 1);
    for (int64_t n = 0; n < deferred; ++n) {
      int64_t least = -1;
      for (int64_t slot = 0; slot < batch.topk; ++slot) {
        if (now[slot] == -1) continue;
        if (least < 0 || weights[slot] <= weights[least]) least = slot;
      }
      std::swap(now[least], later_[begin + least]);
      any = true;
    }
  }
  return any;
}

// Copies what the deferred experts need, since the caller's memory is the next layer's soon.
void Deferral::hand_over(const HostCall& call) {
  const Batch& batch = call.batch;
  const auto* x = static_cast<const uint16_t*>(batch.x);
  for (int64_t token = 0; token < batch.tokens; ++token) {
    std::copy_n(x + token * batch.x_stride, call.hidden, x_.data() + token * call.hidden);
  }
  std::copy_n(batch.weights, batch.tokens * batch.topk, weights_.data());
  work_.layer = call.layer;
  work_.hidden = call.hidden;
  work_.batch = batch;
  work_.batch.x = x_.data();
  work_.batch.x_stride = call.hidden;
  work_.batch.ids = later_.data();
  work_.batch.weights = weights_.data();
  work_.batch.y = y_.data();
  work_.batch.rest = true;
  to_be_added_ = true;
  computing_.add(1);
  {
    const std::lock_guard lock(mutex_);
    given_ = true;
  }
  changed_.notify_one();
}

void Deferral::serve() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return given_ || stop_; });
    if (!given_) return;
    given_ = false;
    lock.unlock();
    lk_run_host_call(&work_);
    computing_.subtract(1);
    lock.lock();
  }
}

}  // namespace lk

#include "lk/host_call.h"

#include <cstring>
#include <exception>
#include <mutex>

#include "lk/deferral.h"
#include "lk/engine.h"

namespace lk {
namespace {

struct Shared {
  std::atomic<int64_t> begun{0};
  std::atomic<int64_t> ended{0};
  std::atomic<int64_t> layer{0};
  // Python reads this after each step; it is nearly always false.
  std::atomic<bool> failed{false};
  std::mutex mutex;
  int64_t failed_layer = 0;
  char text[512] = {};
};

// The object is never destroyed, because a driver's thread may call while the process exits.
Shared& shared() {
  static auto* instance = new Shared;
  return *instance;
}

void fail(const HostCall& call, const char* text) noexcept {
  // 0xffff is NaN in bfloat16 and in float16. An empty batch may have no y.
  const size_t bytes = call.batch.tokens * call.hidden * sizeof(uint16_t);
  if (bytes > 0) std::memset(call.batch.y, 0xff, bytes);
  Shared& s = shared();
  const std::lock_guard lock(s.mutex);
  if (s.failed.load(std::memory_order_relaxed)) return;
  s.failed_layer = call.layer;
  std::strncpy(s.text, text, sizeof(s.text) - 1);
  s.failed.store(true, std::memory_order_release);
}

}  // namespace

extern "C" void lk_run_host_call(void* argument) noexcept {
  HostCall& call = *static_cast<HostCall*>(argument);
  Shared& s = shared();
  s.begun.fetch_add(1);
  // Until then, `layer` names the layer whose deferred experts this call waits for.
  if (call.deferral != nullptr) call.deferral->wait();
  s.layer.store(call.layer, std::memory_order_relaxed);
  try {
    if (call.deferral != nullptr) {
      call.deferral->run(call);
    } else {
      run_layer(call.layer, call.batch, call.hidden);
    }
  } catch (const std::exception& error) {
    fail(call, error.what());
  } catch (...) {
    fail(call, "an exception without a text");
  }
  s.ended.fetch_add(1);
  call.ended.fetch_add(1, std::memory_order_release);
}

HostCallError take_host_call_error() {
  Shared& s = shared();
  if (!s.failed.load(std::memory_order_acquire)) return {};
  const std::lock_guard lock(s.mutex);
  s.failed.store(false, std::memory_order_relaxed);
  return {s.failed_layer, s.text};
}

HostCallProgress host_call_progress() {
  const Shared& s = shared();
  // `ended` is read first, so that no call seems to end before it began.
  const int64_t ended = s.ended.load();
  return {s.begun.load(), ended, s.layer.load(std::memory_order_relaxed)};
}

}  // namespace lk

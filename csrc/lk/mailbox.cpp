#include "lk/mailbox.h"

#include <chrono>

#include "lk/host_call.h"
#include "lk/threading.h"

namespace lk {
namespace {

// The layers of a step follow each other in milliseconds, and steps do so while a sequence decodes.
constexpr auto kAwake = std::chrono::seconds(1);
// The first call after a pause waits no longer than this, and looking costs 0.1% of a core.
constexpr auto kLook = std::chrono::milliseconds(1);
constexpr auto kSpin = std::chrono::microseconds(100);

}  // namespace

Mailbox::Mailbox(MailboxWords* words) : words_(words), thread_([this] { serve(); }) {}

Mailbox::~Mailbox() {
  stop_.store(true, std::memory_order_relaxed);
  thread_.join();
}

void Mailbox::serve() {
  uint64_t address = 0;
  const auto called = [&] {
    address = words_->request.load(std::memory_order_acquire);
    return address != 0;
  };
  auto last = Clock::now();
  while (!stop_.load(std::memory_order_relaxed)) {
    if (!spin_until(called, kSpin)) {
      if (Clock::now() - last > kAwake) std::this_thread::sleep_for(kLook);
      continue;
    }
    // The GPU writes the next request after this call's answer.
    words_->request.store(0, std::memory_order_relaxed);
    lk_run_host_call(reinterpret_cast<void*>(address));
    words_->answer.store(address, std::memory_order_release);
    last = Clock::now();
  }
}

}  // namespace lk

// A call of the expert block that somebody else's thread makes: a GPU driver's, when the work
// queued before it is done.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "lk/moe.h"

namespace lk {

// What run_host_call finds at the address that it is given. Whoever queues a call leaves the
// arguments alone, and the memory that they point to, until the call has ended. A graph may replay
// it for as long as the process lives, so it is never freed.
struct HostCall {
  int64_t layer = 0;  // handle
  int64_t hidden = 0;
  Batch batch;
  std::atomic<int64_t> ended{0};  // calls; what they wrote is seen by who sees the number
};

// C, for drivers: runs the layer on the batch of the HostCall at `argument`. Never throws. On an
// error y becomes NaN and the first text is kept for take_host_call_error(). Allocates nothing, if
// the layer has been reserved for as many tokens.
extern "C" void lk_run_host_call(void* argument) noexcept;

struct HostCallError {
  int64_t layer = 0;  // handle; 0: there was none
  std::string text;
};
// The first error since the last time that one was taken.
HostCallError take_host_call_error();

// Of all calls of this process: one that has begun and does not end for seconds hangs.
struct HostCallProgress {
  int64_t begun = 0;
  int64_t ended = 0;
  int64_t layer = 0;  // handle, of the last that began
};
HostCallProgress host_call_progress();

}  // namespace lk

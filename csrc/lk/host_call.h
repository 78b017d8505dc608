// A call of the expert block by a GPU driver's thread, which makes it when the work queued before
// it is done.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "lk/moe.h"

namespace lk {

class Deferral;

// The arguments of lk_run_host_call. The caller who queues a call must not change them, nor the
// memory that they point to, until the call has ended. A graph may replay the call for as long as
// the process lives, so a HostCall is never freed.
struct HostCall {
  int64_t layer = 0;  // its handle
  int64_t hidden = 0;
  Batch batch;
  // What the model's layers defer (deferral.h); null: this call neither defers nor adds experts.
  Deferral* deferral = nullptr;
  bool first = false;  // of the layers with this Deferral, in the order of a pass
  bool last = false;
  // How many times the call has ended. A thread that reads the number also sees what these calls
  // wrote.
  std::atomic<int64_t> ended{0};
};

// A C function for drivers: runs the layer on the batch of the HostCall at `argument`. It never
// throws. On an error y becomes NaN, and the text of the first error is kept for
// take_host_call_error(). It allocates nothing if reserve() was called for as many tokens.
extern "C" void lk_run_host_call(void* argument) noexcept;

struct HostCallError {
  int64_t layer = 0;  // its handle; 0 if there was no error
  std::string text;
};
// Returns the first error since the last call of this function.
HostCallError take_host_call_error();

// Counts all calls of this process, and the work of each Deferral as calls of its own. A call that
// has begun and does not end for seconds hangs.
struct HostCallProgress {
  int64_t begun = 0;
  int64_t ended = 0;
  int64_t layer = 0;  // the handle of the layer that was computed last, or still is
};
HostCallProgress host_call_progress();

}  // namespace lk

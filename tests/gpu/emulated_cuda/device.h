// What the files of the emulated CUDA share.
//
// Device memory is host memory, and all work is done when it is queued, in the thread that queues
// it. That is one of the orders that CUDA allows. Kernels do nothing here: operations.py and
// interpreter.py compute what they would. A capture records work, and each replay does it in the
// order in which it was recorded.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <mutex>

namespace emulated {

extern std::recursive_mutex mutex;  // It guards all state.
using Lock = std::lock_guard<std::recursive_mutex>;

// Writes a line to the file that EMULATED_CUDA_LOG names: what is not emulated or not allowed.
void log(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Keeps an error for cudaGetLastError, and returns it.
cudaError_t failed(cudaError_t error);

// Where the host reads and writes what the device has at this address. The host cannot access the
// device's own addresses, as on a real machine. All others stay as they are.
void* host_view(const void* address);

// Whether a device can read this address: its own memory, and pinned memory.
bool device_can_read(const void* address);

// The number of devices that this machine has, and the one that this thread uses.
int devices();
int current_device();

// Does work of a stream now, or makes it a part of the graph in which the stream is captured.
cudaError_t enqueue(cudaStream_t stream, std::function<void()> work);

// Returns an error, and spoils the captures, if the caller may not make a call now that allocates
// or waits, because a graph is captured.
cudaError_t check_captures(const char* call);

}  // namespace emulated

// Streams, events, captures and graphs.

#include <chrono>
#include <map>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "tests/gpu/emulated_cuda/device.h"

using emulated::check_captures;
using emulated::failed;
using emulated::Lock;
using emulated::log;
using emulated::mutex;

namespace {

struct Graph {
  std::vector<std::function<void()>> nodes;
};

struct Capture {
  std::shared_ptr<Graph> graph = std::make_shared<Graph>();
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id thread = std::this_thread::get_id();
  unsigned long long id = 0;
  bool spoilt = false;
};

struct Stream {
  std::shared_ptr<Capture> capture;
  bool began_it = false;
  std::set<size_t> before;  // The nodes of the capture that the stream's next work comes after.
  int priority = 0;
};

struct Event {
  std::shared_ptr<Capture> capture;  // In which it was recorded last.
  std::set<size_t> before;
  std::chrono::steady_clock::time_point time;
  bool recorded = false;
  bool timing = true;
};

Stream legacy;  // The default stream.
std::map<cudaStream_t, std::unique_ptr<Stream>> streams;
std::set<std::shared_ptr<Capture>> captures;
thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;

Stream* find(cudaStream_t stream) {
  if (!stream || stream == cudaStreamLegacy || stream == cudaStreamPerThread) return &legacy;
  auto found = streams.find(stream);
  return found == streams.end() ? nullptr : found->second.get();
}

cudaError_t spoil(const std::shared_ptr<Capture>& capture, cudaError_t error, const char* why) {
  log("a capture is spoilt: %s", why);
  capture->spoilt = true;
  return failed(error);
}

// The host waits for a stream, or asks whether it is done.
cudaError_t look_at(cudaStream_t handle, const char* call) {
  Lock lock(mutex);
  Stream* stream = find(handle);
  if (!stream) return failed(cudaErrorInvalidResourceHandle);
  if (stream->capture) return spoil(stream->capture, cudaErrorStreamCaptureUnsupported, call);
  return check_captures(call);
}

cudaError_t look_at(cudaEvent_t handle, const char* call) {
  Lock lock(mutex);
  auto* event = reinterpret_cast<Event*>(handle);
  if (captures.count(event->capture)) return spoil(event->capture, cudaErrorCapturedEvent, call);
  return check_captures(call);
}

cudaStreamCaptureStatus status_of(const Stream& stream) {
  if (!stream.capture) return cudaStreamCaptureStatusNone;
  return stream.capture->spoilt ? cudaStreamCaptureStatusInvalidated
                                : cudaStreamCaptureStatusActive;
}

}  // namespace

namespace emulated {

cudaError_t check_captures(const char* call) {
  Lock lock(mutex);
  for (const auto& capture : captures) {
    bool everywhere = capture->mode == cudaStreamCaptureModeGlobal &&
                      mode_of_thread == cudaStreamCaptureModeGlobal;
    bool here = capture->thread == std::this_thread::get_id() &&
                capture->mode != cudaStreamCaptureModeRelaxed &&
                mode_of_thread != cudaStreamCaptureModeRelaxed;
    if (everywhere || here) return spoil(capture, cudaErrorStreamCaptureUnsupported, call);
  }
  return cudaSuccess;
}

cudaError_t enqueue(cudaStream_t handle, std::function<void()> work) {
  {
    Lock lock(mutex);
    Stream* stream = find(handle);
    if (!stream) return failed(cudaErrorInvalidResourceHandle);
    if (stream == &legacy) {
      for (const auto& capture : captures) {
        if (capture->mode == cudaStreamCaptureModeGlobal) {
          return spoil(capture, cudaErrorStreamCaptureImplicit, "work in the default stream");
        }
      }
    }
    if (stream->capture) {
      if (stream->capture->spoilt) return failed(cudaErrorStreamCaptureInvalidated);
      auto& nodes = stream->capture->graph->nodes;
      stream->before.insert(nodes.size());
      nodes.push_back(std::move(work));
      return cudaSuccess;
    }
  }
  work();
  return cudaSuccess;
}

}  // namespace emulated

extern "C" {

// For the modules in Python.
int emulated_enqueue(cudaStream_t stream, void (*work)(void*), void* argument) {
  return emulated::enqueue(stream, [=] { work(argument); });
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  Lock lock(mutex);
  auto made = std::make_unique<Stream>();
  made->priority = priority;
  *stream = reinterpret_cast<cudaStream_t>(made.get());
  streams[*stream] = std::move(made);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Lock lock(mutex);
  return streams.erase(stream) ? cudaSuccess : failed(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  Lock lock(mutex);
  *priority = find(stream)->priority;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return look_at(stream, "cudaStreamSynchronize");
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return look_at(stream, "cudaStreamQuery"); }

cudaError_t cudaDeviceSynchronize() {
  Lock lock(mutex);
  for (const auto& capture : captures) {
    return spoil(capture, cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize");
  }
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  Lock lock(mutex);
  Stream* stream = find(handle);
  auto* event = reinterpret_cast<Event*>(event_handle);
  if (!stream || !event) return failed(cudaErrorInvalidResourceHandle);
  if (captures.count(event->capture)) {
    if (stream == &legacy) {
      return spoil(event->capture, cudaErrorStreamCaptureImplicit, "the default stream waits");
    }
    if (stream->capture && stream->capture != event->capture) {
      return spoil(event->capture, cudaErrorStreamCaptureMerge, "two captures meet");
    }
    stream->capture = event->capture;
    stream->before.insert(event->before.begin(), event->before.end());
  } else if (stream->capture && event->recorded) {
    return spoil(stream->capture, cudaErrorStreamCaptureIsolation,
                 "it waits for an event from outside");
  }
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
  return emulated::enqueue(stream, [=] { function(argument); });
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function,
                                  void* argument, unsigned) {
  return emulated::enqueue(stream, [=] { function(stream, cudaSuccess, argument); });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  auto* made = new Event;
  made->timing = !(flags & cudaEventDisableTiming);
  *event = reinterpret_cast<cudaEvent_t>(made);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle,
                                     unsigned flags) {
  Lock lock(mutex);
  auto* event = reinterpret_cast<Event*>(handle);
  Stream* stream = find(stream_handle);
  if (!event || !stream) return failed(cudaErrorInvalidResourceHandle);
  event->recorded = true;
  event->time = std::chrono::steady_clock::now();
  event->capture = flags & cudaEventRecordExternal ? nullptr : stream->capture;
  event->before = stream->before;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return look_at(event, "cudaEventQuery"); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return look_at(event, "cudaEventSynchronize");
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t first, cudaEvent_t second) {
  auto *begin = reinterpret_cast<Event*>(first), *end = reinterpret_cast<Event*>(second);
  if (!begin->timing || !end->timing || !begin->recorded || !end->recorded) {
    return failed(cudaErrorInvalidResourceHandle);
  }
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - begin->time).count();
  return cudaSuccess;
}
cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t*, cudaEvent_t) {
  return failed(cudaErrorNotSupported);
}
cudaError_t cudaIpcOpenEventHandle(cudaEvent_t*, cudaIpcEventHandle_t) {
  return failed(cudaErrorNotSupported);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Lock lock(mutex);
  Stream* stream = find(handle);
  if (!stream || stream == &legacy) return failed(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return failed(cudaErrorIllegalState);
  static unsigned long long ids = 0;
  stream->capture = std::make_shared<Capture>();
  stream->capture->mode = mode;
  stream->capture->id = ++ids;
  stream->began_it = true;
  stream->before.clear();
  captures.insert(stream->capture);
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Lock lock(mutex);
  *graph = nullptr;
  Stream* stream = find(handle);
  if (!stream || !stream->capture || !stream->began_it) return failed(cudaErrorIllegalState);
  auto capture = stream->capture;
  size_t joined = stream->before.size();
  for (auto& [_, other] : streams) {
    if (other->capture == capture) {
      other->capture = nullptr;
      other->began_it = false;
      other->before.clear();
    }
  }
  captures.erase(capture);
  if (capture->spoilt) return failed(cudaErrorStreamCaptureInvalidated);
  if (joined != capture->graph->nodes.size()) {
    log("a capture ends before %zu nodes of other streams", capture->graph->nodes.size() - joined);
    return failed(cudaErrorStreamCaptureUnjoined);
  }
  *graph = reinterpret_cast<cudaGraph_t>(new std::shared_ptr<Graph>(capture->graph));
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Lock lock(mutex);
  Stream* stream = find(handle);
  if (!stream) return failed(cudaErrorInvalidResourceHandle);
  if (stream == &legacy) {
    for (const auto& capture : captures) {
      return spoil(capture, cudaErrorStreamCaptureImplicit, "the default stream is asked");
    }
  }
  *status = status_of(*stream);
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  Lock lock(mutex);
  Stream* stream = find(handle);
  if (!stream) return failed(cudaErrorInvalidResourceHandle);
  *status = status_of(*stream);
  if (id && stream->capture) *id = stream->capture->id;
  if (graph) {
    auto* captured = stream->capture ? &stream->capture->graph : nullptr;
    *graph = reinterpret_cast<cudaGraph_t>(captured);
  }
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, mode_of_thread);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph,
                                          unsigned long long) {
  if (!graph) return failed(cudaErrorInvalidValue);
  auto captured = *reinterpret_cast<std::shared_ptr<Graph>*>(graph);
  *made = reinterpret_cast<cudaGraphExec_t>(new std::shared_ptr<Graph>(captured));
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph,
                                 unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(made, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t made, cudaStream_t stream) {
  auto graph = *reinterpret_cast<std::shared_ptr<Graph>*>(made);
  return emulated::enqueue(stream, [graph] {
    for (auto& node : graph->nodes) node();
  });
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<std::shared_ptr<Graph>*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t made) {
  delete reinterpret_cast<std::shared_ptr<Graph>*>(made);
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (!nodes) *count = (*reinterpret_cast<std::shared_ptr<Graph>*>(graph))->nodes.size();
  return cudaSuccess;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*,
                                         size_t* count) {
  *count = 0;
  return cudaSuccess;
}
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }

}  // extern "C"

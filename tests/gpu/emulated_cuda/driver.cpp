// An emulated CUDA driver for Triton, PyTorch and LvLLM's words in streams. It takes the place of
// libcuda.so.1, and shares its state with the emulated runtime.

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "tests/gpu/emulated_cuda/device.h"

namespace {

char contexts[64];  // Of each device.

CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(&contexts[device]); }

// A word that a stream writes or waits for; null: the device cannot reach it.
uint64_t* word_at(CUdeviceptr address) {
  auto* place = reinterpret_cast<void*>(address);
  if (!emulated::device_can_read(place)) return nullptr;
  return static_cast<uint64_t*>(emulated::host_view(place));
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int number) {
  *device = number;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) { return static_cast<CUresult>(cudaGetDeviceCount(count)); }
CUresult cuDeviceGetName(char* name, int length, CUdevice) {
  std::snprintf(name, static_cast<size_t>(length), "Emulated GPU");
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return static_cast<CUresult>(
      cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device));
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* made, CUdevice device) {
  *made = context_of(device);
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* current) {
  *current = context_of(emulated::current_device());
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  auto device = static_cast<int>(reinterpret_cast<char*>(context) - contexts);
  return context ? static_cast<CUresult>(cudaSetDevice(device)) : CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent_v2(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent_v2(CUcontext* current) { return cuCtxGetCurrent(current); }
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = emulated::current_device();
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_SUCCESS ? "no error" : "an error of the emulated driver";
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }
CUresult cuMemGetInfo_v2(size_t* unused, size_t* total) {
  return static_cast<CUresult>(cudaMemGetInfo(unused, total));
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  if (!emulated::device_can_read(reinterpret_cast<void*>(address))) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *static_cast<CUdeviceptr*>(value) = address;
  return CUDA_SUCCESS;
}

// CUDA refuses to load a module while a graph is captured.
CUresult cuModuleLoadData(CUmodule* module, const void*) {
  if (emulated::check_captures("cuModuleLoadData") != 0)
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  *module = reinterpret_cast<CUmodule>(contexts);
  return CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }
CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(module, image);
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char*) {
  *function = reinterpret_cast<CUfunction>(contexts);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction, void**, void**) {
  if (!config->gridDimX || !config->gridDimY || !config->gridDimZ) return CUDA_ERROR_INVALID_VALUE;
  return static_cast<CUresult>(emulated::enqueue(config->hStream, [] {}));
}
CUresult cuLaunchKernel(CUfunction, unsigned x, unsigned y, unsigned z, unsigned, unsigned,
                        unsigned, unsigned, CUstream stream, void**, void**) {
  if (!x || !y || !z) return CUDA_ERROR_INVALID_VALUE;
  return static_cast<CUresult>(emulated::enqueue(stream, [] {}));
}
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuGetProcAddress_v2(const char* name, void** function, int, cuuint64_t,
                             CUdriverProcAddressQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
  if (result) {
    *result = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  }
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

// This describes tensors to kernels of FlashAttention, which are not computed.
CUresult emulated_cuTensorMapEncodeTiled() asm("cuTensorMapEncodeTiled");
CUresult emulated_cuTensorMapEncodeTiled() { return CUDA_SUCCESS; }

// What is not emulated.
#define REFUSED(name)                   \
  CUresult refused_##name() asm(#name); \
  CUresult refused_##name() { return CUDA_ERROR_NOT_SUPPORTED; }
REFUSED(cuMemAddressFree)
REFUSED(cuMemAddressReserve)
REFUSED(cuMemCreate)
REFUSED(cuMemGetAllocationGranularity)
REFUSED(cuMemMap)
REFUSED(cuMemRelease)
REFUSED(cuMemSetAccess)
REFUSED(cuMemUnmap)

CUresult cuStreamWriteValue64_v2(CUstream stream, CUdeviceptr address, cuuint64_t value, unsigned) {
  uint64_t* word = word_at(address);
  if (!word) return CUDA_ERROR_INVALID_VALUE;
  return static_cast<CUresult>(
      emulated::enqueue(stream, [=] { std::atomic_ref<uint64_t>(*word).store(value); }));
}
CUresult cuStreamWaitValue64_v2(CUstream stream, CUdeviceptr address, cuuint64_t value, unsigned) {
  uint64_t* word = word_at(address);
  if (!word) return CUDA_ERROR_INVALID_VALUE;
  return static_cast<CUresult>(emulated::enqueue(stream, [=] {
    auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (std::atomic_ref<uint64_t>(*word).load() != value) {
      std::this_thread::yield();
      if (std::chrono::steady_clock::now() > end) {
        std::fprintf(stderr, "emulated: waited 60 s for a word\n");
        std::abort();
      }
    }
  }));
}

}  // extern "C"

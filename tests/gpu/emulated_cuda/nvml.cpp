// An emulated NVML, for vLLM, which asks it which platform this is.

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tests/gpu/emulated_cuda/device.h"

struct Memory {
  unsigned long long total, free, used;
};
struct Memory2 {
  unsigned version;
  unsigned long long total, reserved, free, used;
};

namespace {

int numbers[64];  // A device's handle is the address of one of these.

}  // namespace

extern "C" {

int nvmlInit() { return 0; }
int nvmlInit_v2() { return 0; }
int nvmlInitWithFlags(unsigned) { return 0; }
int nvmlShutdown() { return 0; }
const char* nvmlErrorString(int) { return "an error of the emulated NVML"; }
int nvmlSystemGetDriverVersion(char* text, unsigned length) {
  std::snprintf(text, length, "580.0");
  return 0;
}
int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = 13000;
  return 0;
}
int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = static_cast<unsigned>(emulated::devices());
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  if (index >= static_cast<unsigned>(emulated::devices())) return 2;
  *device = &numbers[index];
  return 0;
}
int nvmlDeviceGetHandleByUUID(const char* text, void** device) {
  return nvmlDeviceGetHandleByIndex_v2(std::strtoul(text + 4, nullptr, 16) & 0xFF, device);
}
int nvmlDeviceGetName(void*, char* text, unsigned length) {
  std::snprintf(text, length, "Emulated GPU");
  return 0;
}
int nvmlDeviceGetUUID(void* device, char* text, unsigned length) {
  auto number = static_cast<unsigned>(static_cast<int*>(device) - numbers);
  std::snprintf(text, length, "GPU-%08x-0707-0707-0707-070707070707", number);
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(void*, int* major, int* minor) {
  *major = 9;
  *minor = 0;
  return 0;
}
int nvmlDeviceGetMemoryInfo(void*, Memory* memory) {
  size_t unused, total;
  cudaMemGetInfo(&unused, &total);
  *memory = {total, unused, total - unused};
  return 0;
}
int nvmlDeviceGetMemoryInfo_v2(void*, Memory2* memory) {
  size_t unused, total;
  cudaMemGetInfo(&unused, &total);
  *memory = {memory->version, total, 0, unused, total - unused};
  return 0;
}
int nvmlDeviceGetMemoryAffinity(void*, unsigned, unsigned long*, int) { return 3; }
int nvmlDeviceGetP2PStatus(void*, void*, int, int* status) {
  *status = 1;
  return 0;
}

}  // extern "C"

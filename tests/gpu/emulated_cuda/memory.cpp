// Device memory, pinned memory, and copies.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>

#include "tests/gpu/emulated_cuda/device.h"

using emulated::check_captures;
using emulated::enqueue;
using emulated::failed;
using emulated::Lock;
using emulated::mutex;

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kAlignment = 512;
constexpr size_t kOverwritten = size_t{1} << 20;  // Of memory that is given or taken back.

size_t round_up(size_t bytes, size_t unit) {
  return (std::max(bytes, size_t{1}) + unit - 1) / unit * unit;
}

// The memory of all devices, one after another. A file is mapped twice: at the devices' addresses
// nobody can read it.
class Arena {
 public:
  Arena() {
    const char* gib = std::getenv("EMULATED_CUDA_GIB");
    part = (gib ? std::strtoull(gib, nullptr, 10) : 4) << 30;
    size = part * static_cast<size_t>(emulated::devices());
    int file = memfd_create("emulated-cuda", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, static_cast<off_t>(size)) != 0) std::abort();
    device = map(file, PROT_NONE);
    host = map(file, PROT_READ | PROT_WRITE);
    close(file);
  }

  bool has(const void* address) const { return address >= device && address < device + size; }

  int device_of(const void* address) const { return static_cast<int>(offset_of(address) / part); }

  void* take(size_t bytes) {
    bytes = round_up(bytes, kAlignment);
    size_t begin = static_cast<size_t>(emulated::current_device()) * part, end = begin + part;
    for (auto next = taken_.lower_bound(begin); next != taken_.end(); ++next) {
      if (next->first - begin >= bytes) break;
      begin = next->first + next->second;
    }
    if (begin + bytes > end) return nullptr;
    taken_[begin] = bytes;
    return device + begin;
  }

  // The bytes that are taken of the current device.
  size_t used() const {
    size_t begin = static_cast<size_t>(emulated::current_device()) * part, sum = 0;
    for (auto [offset, length] : taken_) sum += offset - begin < part ? length : 0;
    return sum;
  }

  bool give_back(const void* address) {
    auto found = taken_.find(offset_of(address));
    if (found == taken_.end()) return false;
    // A later use of this memory is seen.
    std::memset(host + found->first, 0xAB, std::min(found->second, kOverwritten));
    taken_.erase(found);
    return true;
  }

  size_t part = 0;  // Of each device.
  size_t size = 0;
  char* device = nullptr;
  char* host = nullptr;

 private:
  size_t offset_of(const void* address) const {
    return static_cast<size_t>(static_cast<const char*>(address) - device);
  }

  char* map(int file, int access) {
    void* place = mmap(nullptr, size, access, MAP_SHARED | MAP_NORESERVE, file, 0);
    if (place == MAP_FAILED) std::abort();
    return static_cast<char*>(place);
  }

  std::map<size_t, size_t> taken_;  // The bytes at each offset.
};

Arena& arena() {
  static Arena* made = new Arena;  // It outlives what frees memory at the end of the process.
  return *made;
}

std::map<uintptr_t, size_t> pinned;               // In whole pages.
std::map<const void*, size_t> allocated_on_host;  // Of these, the ones that CUDA allocated.

uintptr_t page_of(const void* address) {
  return reinterpret_cast<uintptr_t>(address) / kPage * kPage;
}

cudaError_t copy(void* target, const void* source, size_t bytes, cudaStream_t stream) {
  return enqueue(stream, [=] {
    std::memcpy(emulated::host_view(target), emulated::host_view(source), bytes);
  });
}

}  // namespace

namespace emulated {

std::recursive_mutex mutex;

void* host_view(const void* address) {
  Arena& memory = arena();
  if (!memory.has(address)) return const_cast<void*>(address);
  return memory.host + (static_cast<const char*>(address) - memory.device);
}

bool device_can_read(const void* address) {
  Lock lock(mutex);
  if (arena().has(address)) return true;
  auto place = reinterpret_cast<uintptr_t>(address);
  auto after = pinned.upper_bound(place);
  if (after == pinned.begin()) return false;
  --after;
  return place < after->first + after->second;
}

}  // namespace emulated

extern "C" {

// For the modules in Python.
void* emulated_host_view(const void* address) { return emulated::host_view(address); }
int emulated_device_can_read(const void* address) { return emulated::device_can_read(address); }
void emulated_arena(uint64_t* device, uint64_t* host, uint64_t* size) {
  *device = reinterpret_cast<uint64_t>(arena().device);
  *host = reinterpret_cast<uint64_t>(arena().host);
  *size = arena().size;
}

cudaError_t cudaMalloc(void** address, size_t bytes) {
  Lock lock(mutex);
  if (cudaError_t error = check_captures("cudaMalloc")) return error;
  *address = arena().take(bytes);
  return *address ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

cudaError_t cudaFree(void* address) {
  Lock lock(mutex);
  if (!address) return cudaSuccess;
  if (cudaError_t error = check_captures("cudaFree")) return error;
  return arena().give_back(address) ? cudaSuccess : failed(cudaErrorInvalidValue);
}

cudaError_t cudaMallocAsync(void** address, size_t bytes, cudaStream_t) {
  Lock lock(mutex);
  *address = arena().take(bytes);
  return *address ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

cudaError_t cudaFreeAsync(void* address, cudaStream_t) {
  Lock lock(mutex);
  return arena().give_back(address) ? cudaSuccess : failed(cudaErrorInvalidValue);
}

cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
  Lock lock(mutex);
  *total = arena().part;
  *unused = arena().part - arena().used();
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  Lock lock(mutex);
  if (cudaError_t error = check_captures("cudaHostAlloc")) return error;
  size_t whole = round_up(bytes, kPage);
  void* memory = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
  std::memset(memory, 0xCD, std::min(whole, kOverwritten));  // Nobody may rely on zeros.
  pinned[reinterpret_cast<uintptr_t>(memory)] = whole;
  allocated_on_host[memory] = whole;
  *address = memory;
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** address, size_t bytes) {
  return cudaHostAlloc(address, bytes, 0);
}

cudaError_t cudaFreeHost(void* address) {
  Lock lock(mutex);
  if (!address) return cudaSuccess;
  if (cudaError_t error = check_captures("cudaFreeHost")) return error;
  auto found = allocated_on_host.find(address);
  if (found == allocated_on_host.end()) return failed(cudaErrorInvalidValue);
  munmap(address, found->second);
  pinned.erase(reinterpret_cast<uintptr_t>(address));
  allocated_on_host.erase(found);
  return cudaSuccess;
}

// CUDA registers whole pages, and none of them twice.
cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  Lock lock(mutex);
  if (cudaError_t error = check_captures("cudaHostRegister")) return error;
  if (bytes == 0) return failed(cudaErrorInvalidValue);
  uintptr_t begin = page_of(address);
  uintptr_t end = page_of(static_cast<char*>(address) + bytes - 1) + kPage;
  for (auto [first, size] : pinned) {
    if (first < end && begin < first + size) return failed(cudaErrorHostMemoryAlreadyRegistered);
  }
  pinned[begin] = end - begin;
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* address) {
  Lock lock(mutex);
  if (cudaError_t error = check_captures("cudaHostUnregister")) return error;
  if (allocated_on_host.count(address) || !pinned.erase(page_of(address))) {
    return failed(cudaErrorHostMemoryNotRegistered);
  }
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  *attributes = {};
  attributes->device = emulated::current_device();
  void* place = const_cast<void*>(address);
  if (arena().has(address)) {
    attributes->device = arena().device_of(address);
    attributes->type = cudaMemoryTypeDevice;
    attributes->devicePointer = place;
  } else if (emulated::device_can_read(address)) {
    attributes->type = cudaMemoryTypeHost;
    attributes->devicePointer = attributes->hostPointer = place;
  } else {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->hostPointer = place;
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return copy(target, source, bytes, stream);
}

cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t bytes,
                                cudaStream_t stream) {
  return copy(target, source, bytes, stream);
}

cudaError_t cudaMemcpy2DAsync(void* target, size_t to, const void* source, size_t from,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
  for (size_t i = 0; i < height; ++i) {
    cudaError_t error = copy(static_cast<char*>(target) + i * to,
                             static_cast<const char*>(source) + i * from, width, stream);
    if (error) return error;
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  if (cudaError_t error = check_captures("cudaMemcpy")) return error;
  return copy(target, source, bytes, nullptr);
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t stream) {
  return enqueue(stream, [=] { std::memset(emulated::host_view(target), value, bytes); });
}

cudaError_t cudaMemset(void* target, int value, size_t bytes) {
  return cudaMemsetAsync(target, value, bytes, nullptr);
}

// What is not needed without memory that processes share, or kernels that read variables.
cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  return cudaMallocAsync(address, 1 << 16, nullptr);
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = nullptr;
  return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  *static_cast<uint64_t*>(value) = 0;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) {
  return cudaSuccess;
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) {
  return failed(cudaErrorNotSupported);
}
cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) {
  return failed(cudaErrorNotSupported);
}
cudaError_t cudaIpcCloseMemHandle(void*) { return failed(cudaErrorNotSupported); }

}  // extern "C"

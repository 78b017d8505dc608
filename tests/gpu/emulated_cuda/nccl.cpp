// An emulated NCCL for the processes of one host. It takes the place of libnccl.so.2.
//
// A message is a file in the folder that EMULATED_CUDA_MESSAGES names: its sender renames it to its
// final name, and its receiver waits for it and removes it. So sending never waits. An operation is
// work in a stream: it sends this rank's part to all who want it, and then takes the parts of the
// others. A graph does both at each replay.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "tests/gpu/emulated_cuda/device.h"

// These are declared here, so that NCCL's header is not needed.
struct Id {
  char text[128];
};
struct Communicator {
  std::string name;
  int ranks, rank, device;
  int splits = 0;
  std::map<int, uint64_t> sent, received;  // The number of messages, by the other rank.
};
enum Result { kSuccess, kInvalidArgument = 4, kInvalidUsage = 5 };
enum Operation { kSum, kProduct, kMaximum, kMinimum, kAverage };

namespace {

constexpr int kVersion = 22809;
constexpr auto kPatience = std::chrono::minutes(10);

using Bytes = std::vector<char>;

std::string path_of(const Communicator& in, int from, int to, uint64_t number) {
  return std::string(std::getenv("EMULATED_CUDA_MESSAGES")) + "/" + in.name + "-" +
         std::to_string(from) + "-" + std::to_string(to) + "-" + std::to_string(number);
}

void send(Communicator& in, int to, const void* data, size_t bytes) {
  std::string path = path_of(in, in.rank, to, in.sent[to]++);
  std::ofstream(path + "+", std::ios::binary)
      .write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  std::filesystem::rename(path + "+", path);
}

Bytes receive(Communicator& in, int from, size_t bytes) {
  std::string path = path_of(in, from, in.rank, in.received[from]++);
  auto end = std::chrono::steady_clock::now() + kPatience;
  while (!std::filesystem::exists(path)) {
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    if (std::chrono::steady_clock::now() > end) {
      std::fprintf(stderr, "emulated: rank %d waited for %s\n", in.rank, path.c_str());
      std::abort();
    }
  }
  if (size_t found = std::filesystem::file_size(path); found != bytes) {
    std::fprintf(stderr, "emulated: rank %d wanted %zu bytes, rank %d sent %zu\n", in.rank, bytes,
                 from, found);
    std::abort();
  }
  Bytes data(bytes);
  std::ifstream(path, std::ios::binary).read(data.data(), static_cast<std::streamsize>(bytes));
  std::filesystem::remove(path);
  return data;
}

// The two halves of an operation. In a group, all ranks send before anyone waits.
struct Halves {
  cudaStream_t stream;
  std::function<void()> send, receive;
};
thread_local std::vector<Halves> group;
thread_local int groups_open = 0;

int enqueue_group() {
  std::map<cudaStream_t, std::vector<Halves>> by_stream;
  for (Halves& one : group) by_stream[one.stream].push_back(std::move(one));
  group.clear();
  for (auto& [stream, some] : by_stream) {
    cudaError_t error = emulated::enqueue(stream, [some = some] {
      for (const Halves& one : some) one.send();
      for (const Halves& one : some) one.receive();
    });
    if (error) return 1;
  }
  return kSuccess;
}

int add(cudaStream_t stream, std::function<void()> send, std::function<void()> receive) {
  group.push_back({stream, std::move(send), std::move(receive)});
  return groups_open ? int{kSuccess} : enqueue_group();
}

size_t size_of(int type) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return sizes[type];
}

struct BFloat16 {
  uint16_t bits;
  BFloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    bits = static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
  }
  operator float() const {
    uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
};

// Floats narrower than 32 bits are summed in 32 bits and rounded once. With two ranks, that is what
// NCCL does as well.
template <typename T>
void reduce_as(const std::vector<Bytes>& parts, void* target, size_t count, int operation) {
  using Sum = std::conditional_t<sizeof(T) == 2, float, T>;
  for (size_t i = 0; i < count; ++i) {
    auto value_of = [&](const Bytes& part) {
      return static_cast<Sum>(reinterpret_cast<const T*>(part.data())[i]);
    };
    Sum sum = value_of(parts[0]);
    for (size_t k = 1; k < parts.size(); ++k) {
      Sum value = value_of(parts[k]);
      switch (operation) {
        case kProduct:
          sum *= value;
          break;
        case kMaximum:
          sum = std::max(sum, value);
          break;
        case kMinimum:
          sum = std::min(sum, value);
          break;
        default:
          sum += value;
      }
    }
    if (operation == kAverage) sum /= static_cast<Sum>(parts.size());
    static_cast<T*>(target)[i] = static_cast<T>(sum);
  }
}

void reduce(const std::vector<Bytes>& parts, void* target, size_t count, int type, int operation) {
  switch (type) {
    case 0:
      return reduce_as<int8_t>(parts, target, count, operation);
    case 1:
      return reduce_as<uint8_t>(parts, target, count, operation);
    case 2:
      return reduce_as<int32_t>(parts, target, count, operation);
    case 3:
      return reduce_as<uint32_t>(parts, target, count, operation);
    case 4:
      return reduce_as<int64_t>(parts, target, count, operation);
    case 5:
      return reduce_as<uint64_t>(parts, target, count, operation);
    case 6:
      return reduce_as<_Float16>(parts, target, count, operation);
    case 7:
      return reduce_as<float>(parts, target, count, operation);
    case 8:
      return reduce_as<double>(parts, target, count, operation);
    case 9:
      return reduce_as<BFloat16>(parts, target, count, operation);
    default:
      std::fprintf(stderr, "emulated: a sum of type %d\n", type);
      std::abort();
  }
}

// Each rank sends part `to` of its data, of `bytes` each, to rank `to`; with one part, to all. Then
// `take` gets what the ranks have sent to this one, in the order of the ranks.
int exchange(Communicator* in, const void* data, size_t bytes, bool one_part, cudaStream_t stream,
             std::function<void(const std::vector<Bytes>&)> take) {
  auto send_all = [=] {
    auto* host = static_cast<const char*>(emulated::host_view(data));
    for (int to = 0; to < in->ranks; ++to) {
      send(*in, to, host + (one_part ? 0 : bytes * static_cast<size_t>(to)), bytes);
    }
  };
  return add(stream, send_all, [=] {
    std::vector<Bytes> parts;
    for (int from = 0; from < in->ranks; ++from) parts.push_back(receive(*in, from, bytes));
    take(parts);
  });
}

void write_all(const std::vector<Bytes>& parts, void* target) {
  auto* host = static_cast<char*>(emulated::host_view(target));
  for (const Bytes& part : parts) host = std::copy(part.begin(), part.end(), host);
}

}  // namespace

extern "C" {

int ncclGetVersion(int* version) {
  *version = kVersion;
  return kSuccess;
}
const char* ncclGetErrorString(int) { return "an error of the emulated NCCL"; }
const char* ncclGetLastError(Communicator*) { return ""; }
int ncclGetUniqueId(Id* id) {
  std::random_device random;
  *id = {};
  std::snprintf(id->text, sizeof id->text, "%08x%08x", random(), random());
  return kSuccess;
}

int ncclCommInitRank(Communicator** made, int ranks, Id id, int rank) {
  *made = new Communicator{id.text, ranks, rank, emulated::current_device()};
  return kSuccess;
}
int ncclCommInitRankConfig(Communicator** made, int ranks, Id id, int rank, void*) {
  return ncclCommInitRank(made, ranks, id, rank);
}
int ncclCommInitRankScalable(Communicator** made, int ranks, int rank, int, Id* ids, void*) {
  return ncclCommInitRank(made, ranks, *ids, rank);
}

// All ranks say their colour and key. Those of one colour are ordered by their keys.
int ncclCommSplit(Communicator* in, int color, int key, Communicator** made, void*) {
  int mine[] = {color, key};
  for (int to = 0; to < in->ranks; ++to) send(*in, to, mine, sizeof mine);
  std::vector<std::pair<int, int>> chosen;  // Key and rank.
  for (int from = 0; from < in->ranks; ++from) {
    Bytes said = receive(*in, from, sizeof mine);
    int theirs[2];
    std::memcpy(theirs, said.data(), sizeof theirs);
    if (theirs[0] == color) chosen.emplace_back(theirs[1], from);
  }
  std::stable_sort(chosen.begin(), chosen.end());
  std::string name = in->name + "." + std::to_string(in->splits++) + "." + std::to_string(color);
  *made = nullptr;
  if (color < 0) return kSuccess;
  auto own = std::find(chosen.begin(), chosen.end(), std::pair(key, in->rank));
  *made = new Communicator{name, static_cast<int>(chosen.size()),
                           static_cast<int>(own - chosen.begin()), in->device};
  return kSuccess;
}

int ncclCommFinalize(Communicator*) { return kSuccess; }
int ncclCommDestroy(Communicator*) { return kSuccess; }  // Graphs may still refer to it.
int ncclCommAbort(Communicator*) { return kSuccess; }
int ncclCommGetAsyncError(Communicator*, int* error) {
  *error = kSuccess;
  return kSuccess;
}
int ncclCommCount(const Communicator* in, int* count) {
  *count = in->ranks;
  return kSuccess;
}
int ncclCommUserRank(const Communicator* in, int* rank) {
  *rank = in->rank;
  return kSuccess;
}
int ncclCommCuDevice(const Communicator* in, int* device) {
  *device = in->device;
  return kSuccess;
}

int ncclGroupStart() {
  ++groups_open;
  return kSuccess;
}
int ncclGroupEnd() {
  if (groups_open == 0) return kInvalidUsage;
  return --groups_open ? int{kSuccess} : enqueue_group();
}

int ncclSend(const void* data, size_t count, int type, int to, Communicator* in,
             cudaStream_t stream) {
  auto send_it = [=] { send(*in, to, emulated::host_view(data), count * size_of(type)); };
  return add(stream, send_it, [] {});
}
int ncclRecv(void* target, size_t count, int type, int from, Communicator* in,
             cudaStream_t stream) {
  auto receive_it = [=] { write_all({receive(*in, from, count * size_of(type))}, target); };
  return add(stream, [] {}, receive_it);
}

int ncclAllReduce(const void* data, void* target, size_t count, int type, int operation,
                  Communicator* in, cudaStream_t stream) {
  if (operation > kAverage) return kInvalidArgument;
  auto take = [=](const std::vector<Bytes>& parts) {
    reduce(parts, emulated::host_view(target), count, type, operation);
  };
  return exchange(in, data, count * size_of(type), true, stream, take);
}
int ncclReduce(const void* data, void* target, size_t count, int type, int operation, int root,
               Communicator* in, cudaStream_t stream) {
  if (operation > kAverage) return kInvalidArgument;
  auto take = [=](const std::vector<Bytes>& parts) {
    if (in->rank == root) reduce(parts, emulated::host_view(target), count, type, operation);
  };
  return exchange(in, data, count * size_of(type), true, stream, take);
}
int ncclReduceScatter(const void* data, void* target, size_t count, int type, int operation,
                      Communicator* in, cudaStream_t stream) {
  if (operation > kAverage) return kInvalidArgument;
  auto take = [=](const std::vector<Bytes>& parts) {
    reduce(parts, emulated::host_view(target), count, type, operation);
  };
  return exchange(in, data, count * size_of(type), false, stream, take);
}
int ncclAllGather(const void* data, void* target, size_t count, int type, Communicator* in,
                  cudaStream_t stream) {
  auto take = [=](const std::vector<Bytes>& parts) { write_all(parts, target); };
  return exchange(in, data, count * size_of(type), true, stream, take);
}
int ncclAlltoAll(const void* data, void* target, size_t count, int type, Communicator* in,
                 cudaStream_t stream) {
  auto take = [=](const std::vector<Bytes>& parts) { write_all(parts, target); };
  return exchange(in, data, count * size_of(type), false, stream, take);
}
int ncclBroadcast(const void* data, void* target, size_t count, int type, int root,
                  Communicator* in, cudaStream_t stream) {
  size_t bytes = count * size_of(type);
  auto send_all = [=] {
    if (in->rank != root) return;
    for (int to = 0; to < in->ranks; ++to) send(*in, to, emulated::host_view(data), bytes);
  };
  return add(stream, send_all, [=] { write_all({receive(*in, root, bytes)}, target); });
}
int ncclBcast(void* data, size_t count, int type, int root, Communicator* in, cudaStream_t stream) {
  return ncclBroadcast(data, data, count, type, root, in, stream);
}

// What is not emulated.
#define REFUSED(name)              \
  int refused_##name() asm(#name); \
  int refused_##name() { return kInvalidUsage; }
REFUSED(ncclCommDeregister)
REFUSED(ncclCommInitAll)
REFUSED(ncclCommRegister)
REFUSED(ncclCommResume)
REFUSED(ncclCommShrink)
REFUSED(ncclCommSuspend)
REFUSED(ncclCommWindowDeregister)
REFUSED(ncclCommWindowRegister)
REFUSED(ncclDevCommCreate)
REFUSED(ncclDevCommDestroy)
REFUSED(ncclGroupSimulateEnd)
REFUSED(ncclMemAlloc)
REFUSED(ncclMemFree)
REFUSED(ncclRedOpCreatePreMulSum)
REFUSED(ncclRedOpDestroy)

}  // extern "C"

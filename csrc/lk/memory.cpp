#include "lk/memory.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <iomanip>
#include <map>
#include <mutex>
#include <sstream>

#include "lk/free_memory.h"
#include "lk/integers.h"
#include "lk/rows.h"

namespace lk {
namespace {

// From <linux/mempolicy.h>; libnuma would be one more package to ask the user for.
constexpr int kPreferred = 1;
constexpr int kInterleave = 3;
constexpr int kMemsAllowed = 1 << 2;
// From <linux/mman.h>, of Linux 6.1, which the C library's headers may be older than.
constexpr int kCollapse = 25;

// Masks of nodes have a bit for every number that the kernel can give a node, on any architecture
// (its NODES_SHIFT is at most 10).
constexpr int kNodeNumbers = 1024;
constexpr int kMaskBits = 8 * sizeof(unsigned long);
using NodeMask = std::array<unsigned long, kNodeNumbers / kMaskBits>;

NodeMask mask_of(const std::vector<int>& nodes) {
  NodeMask mask{};
  for (int node : nodes) mask[node / kMaskBits] |= 1UL << (node % kMaskBits);
  return mask;
}

struct Area {
  int64_t size = 0;
  int descriptor = -1;  // of memory that is shared
  bool ours = true;     // and not another process's
};

struct Registry {
  std::mutex mutex;
  std::map<void*, Area> areas;
};

// Never destroyed: tensors may be released while the process exits.
Registry& registry() {
  static auto* instance = new Registry;
  return *instance;
}

std::string gib(int64_t bytes) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(2) << static_cast<double>(bytes) / (int64_t{1} << 30)
       << " GiB";
  return text.str();
}

// Bytes of our allocations that have pages already. Slow (a byte a page), so asked only when the
// plain sum does not fit.
int64_t resident_bytes(const std::map<void*, Area>& areas) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  int64_t pages = 0;
  std::vector<unsigned char> present;
  for (const auto& [memory, area] : areas) {
    present.resize(area.size / page);
    if (!area.ours || mincore(memory, area.size, present.data()) != 0) continue;
    pages += std::count_if(present.begin(), present.end(), [](unsigned char p) { return p & 1; });
  }
  return pages * page;
}

[[noreturn]] void fail(int64_t asked, int64_t promised, int64_t available) {
  std::string text = "cannot allocate " + gib(asked) + " for expert weights: " + gib(available) +
                     " of memory are free";
  if (promised > 0) text += ", of which " + gib(promised) + " are promised to earlier weights";
  throw OutOfMemory(text);
}

// Throws OutOfMemory unless there is room for so many bytes. mmap promises more than there is, and
// the kernel kills the process when it cannot keep the promise; so the sum is done here, before a
// minute of loading. The caller holds the mutex.
void check_room(const Registry& all, int64_t bytes) {
  const int64_t available = available_bytes();
  int64_t promised = 0;
  for (const auto& [memory, area] : all.areas) promised += area.ours ? area.size : 0;
  if (promised + bytes <= available) return;
  promised = std::max<int64_t>(0, promised - resident_bytes(all.areas));
  if (bytes > available - promised) fail(bytes, promised, available);
}

// A range of addresses that starts on a huge page, without memory; null if there is none.
char* reserve(int64_t size) {
  // One huge page more; the ends are given back.
  void* raw = mmap(nullptr, size + kHugePage, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* start = static_cast<char*>(raw);
  char* aligned = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(start), kHugePage));
  if (aligned > start) munmap(start, aligned - start);
  char* end = start + size + kHugePage;
  if (end > aligned + size) munmap(aligned + size, end - (aligned + size));
  return aligned;
}

[[noreturn]] void refuse(const char* what, int64_t bytes) {
  throw std::runtime_error("cannot " + std::string(what) + " " + gib(bytes) +
                           " of shared memory: " + std::strerror(errno));
}

// Maps the file at a range of its own; null if that fails.
char* map_file(int descriptor, int64_t size, int protection) {
  char* memory = reserve(size);
  if (memory != nullptr &&
      mmap(memory, size, protection, MAP_SHARED | MAP_FIXED, descriptor, 0) != MAP_FAILED) {
    return memory;
  }
  const int error = errno;
  if (memory != nullptr) munmap(memory, size);
  errno = error;
  return nullptr;
}

}  // namespace

std::vector<Extent> plan_placement(const RowLayout& layout, const std::vector<int>& node_workers,
                                   int64_t page_bytes) {
  const std::vector<int64_t> bounds = divide_rows(layout.rows, node_workers);
  const int64_t part_bytes = layout.rows * layout.row_bytes;
  std::vector<Extent> extents;
  int64_t begin = 0;
  for (int64_t part = 0; part < layout.experts * layout.parts; ++part) {
    for (int node = 0; node < static_cast<int>(node_workers.size()); ++node) {
      const int64_t bound = part * part_bytes + bounds[node + 1] * layout.row_bytes;
      const int64_t end =
          bound == layout.bytes()
              ? bound
              : std::min(round_up(bound - page_bytes / 2, page_bytes), layout.bytes());
      if (end <= begin) continue;
      if (!extents.empty() && extents.back().node == node) {
        extents.back().end = end;
      } else {
        extents.push_back({begin, end, node});
      }
      begin = end;
    }
  }
  return extents;
}

int64_t cross_node_bytes(const RowLayout& layout, const std::vector<int>& node_workers,
                         const std::vector<Extent>& extents) {
  const std::vector<int64_t> bounds = divide_rows(layout.rows, node_workers);
  int64_t cross = 0;
  size_t at = 0;
  for (int64_t part = 0; part < layout.experts * layout.parts; ++part) {
    for (int node = 0; node < static_cast<int>(node_workers.size()); ++node) {
      const int64_t begin = (part * layout.rows + bounds[node]) * layout.row_bytes;
      const int64_t end = (part * layout.rows + bounds[node + 1]) * layout.row_bytes;
      for (int64_t from = begin; from < end; from = std::min(end, extents[at].end)) {
        while (extents[at].end <= from) ++at;
        if (extents[at].node != node) cross += std::min(end, extents[at].end) - from;
      }
    }
  }
  return cross;
}

int64_t placement_page(const RowLayout& layout, const std::vector<int>& node_workers) {
  // Small pages cost up to a fifth of the decode speed (see allocate(); measured on a virtual
  // machine, where page walks are slowest). Rows on another socket are read at roughly half speed,
  // so that the two are even somewhere between an eighth and a fifth: a judgement, not measured.
  const std::vector<Extent> huge = plan_placement(layout, node_workers, kHugePage);
  const int64_t cross = cross_node_bytes(layout, node_workers, huge);
  return cross > layout.bytes() / 8 ? kSmallPage : kHugePage;
}

void* allocate(int64_t bytes, int64_t page_bytes) {
  const int64_t size = round_up(std::max<int64_t>(bytes, 1), kHugePage);
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  check_room(all, bytes);
  char* memory = reserve(size);
  if (memory == nullptr || mprotect(memory, size, PROT_READ | PROT_WRITE) != 0) {
    if (memory != nullptr) munmap(memory, size);
    fail(bytes, 0, available_bytes());
  }
  // On 4 KiB pages the walks of the page table show: 1 token of Qwen3-30B-A3B's shape in bf16 took
  // 2.7 ms on one Zen 5 core, on huge pages 2.2 ms. The last, partly used huge page is left in
  // small ones, so that what becomes resident is what was asked for.
  const int64_t huge = bytes / kHugePage * kHugePage;
  if (page_bytes == kSmallPage) {
    madvise(memory, size, MADV_NOHUGEPAGE);
  } else if (huge > 0) {
    madvise(memory, huge, MADV_HUGEPAGE);
  }
  all.areas[memory] = {.size = size};
  return memory;
}

void* allocate_shared(int64_t bytes) {
  const int64_t size = round_up(std::max<int64_t>(bytes, 1), kHugePage);
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  check_room(all, bytes);
  const int descriptor = memfd_create("lvllm-experts", MFD_CLOEXEC);
  if (descriptor < 0) refuse("create", bytes);
  char* memory = nullptr;
  if (ftruncate(descriptor, size) == 0) {
    memory = map_file(descriptor, size, PROT_READ | PROT_WRITE);
  }
  if (memory == nullptr) {
    const int error = errno;
    close(descriptor);
    errno = error;
    refuse("map", bytes);
  }
  all.areas[memory] = {.size = size, .descriptor = descriptor};
  return memory;
}

SharedPlace shared_place(const void* address) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  const auto* at = static_cast<const char*>(address);
  auto found = all.areas.upper_bound(const_cast<void*>(address));
  if (found != all.areas.begin()) {
    const auto& [memory, area] = *--found;
    const int64_t offset = at - static_cast<const char*>(memory);
    if (offset < area.size && area.descriptor >= 0) return {area.descriptor, offset, area.size};
  }
  throw std::invalid_argument("the address is not in shared memory");
}

void* map_shared(int descriptor, int64_t bytes) {
  struct stat file{};
  if (fstat(descriptor, &file) != 0) refuse("map", bytes);
  if (bytes < 1 || file.st_size < bytes || bytes % kHugePage != 0) {
    throw std::runtime_error("shared memory of " + std::to_string(file.st_size) + " bytes, not " +
                             std::to_string(bytes));
  }
  char* memory = map_file(descriptor, bytes, PROT_READ);
  if (memory == nullptr) refuse("map", bytes);
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  all.areas[memory] = {.size = bytes, .ours = false};
  return memory;
}

void release(void* memory) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  const auto found = all.areas.find(memory);
  if (found == all.areas.end()) return;
  munmap(found->first, found->second.size);
  if (found->second.descriptor >= 0) close(found->second.descriptor);
  all.areas.erase(found);
}

void touch_on_node(void* memory, const Extent& extent, int node, int64_t page_bytes) {
  NodeMask before{};
  int policy = 0;
  // The policy of the thread, not mbind: an mbind for each expert's share would split the mapping
  // into more areas than the kernel allows a process (vm.max_map_count, 65530).
  const bool saved =
      syscall(SYS_get_mempolicy, &policy, before.data(), kNodeNumbers, nullptr, 0) == 0;
  const NodeMask mask = mask_of({node});
  syscall(SYS_set_mempolicy, kPreferred, mask.data(), kNodeNumbers);
  for (int64_t at = extent.begin; at < extent.end; at += page_bytes) {
    static_cast<volatile char*>(memory)[at] = 0;
  }
  if (saved) syscall(SYS_set_mempolicy, policy, before.data(), kNodeNumbers);
}

bool make_huge(void* memory, const Extent& extent) {
  // The kernel's setting for shared memory (shmem_enabled) is "never" nearly everywhere; this asks
  // for the pages whatever it says. A range that has no page at all is refused.
  const int64_t begin = round_up(extent.begin, kHugePage);
  const int64_t end = extent.end / kHugePage * kHugePage;
  return end <= begin || madvise(static_cast<char*>(memory) + begin, end - begin, kCollapse) == 0;
}

void interleave(void* memory, int64_t bytes, const std::vector<int>& nodes) {
  // One mapping and one policy for the whole bank, so that the limit above is far.
  const NodeMask mask = mask_of(nodes);
  if (syscall(SYS_mbind, memory, bytes, kInterleave, mask.data(), kNodeNumbers, 0) != 0) {
    throw std::runtime_error("cannot interleave " + gib(bytes) + " over " +
                             std::to_string(nodes.size()) +
                             " NUMA nodes: mbind: " + std::strerror(errno));
  }
}

std::vector<int> memory_nodes() {
  NodeMask mask{};
  if (syscall(SYS_get_mempolicy, nullptr, mask.data(), kNodeNumbers, nullptr, kMemsAllowed) != 0) {
    return {0};  // a kernel without NUMA
  }
  std::vector<int> nodes;
  for (int node = 0; node < kNodeNumbers; ++node) {
    if (mask[node / kMaskBits] >> (node % kMaskBits) & 1) nodes.push_back(node);
  }
  return nodes;
}

std::vector<int> page_nodes(const std::vector<const void*>& addresses) {
  std::vector<void*> pages;
  for (const void* address : addresses) pages.push_back(const_cast<void*>(address));
  std::vector<int> status(pages.size(), -1);
  syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, status.data(), 0);
  for (int& node : status) node = std::max(node, -1);
  return status;
}

int64_t allocated_bytes() {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  int64_t sum = 0;
  for (const auto& [memory, area] : all.areas) sum += area.ours ? area.size : 0;
  return sum;
}

}  // namespace lk

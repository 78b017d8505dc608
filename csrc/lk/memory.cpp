#include "lk/memory.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iomanip>
#include <map>
#include <mutex>
#include <sstream>

#include "lk/free_memory.h"
#include "lk/integers.h"
#include "lk/nodes.h"
#include "lk/rows.h"

namespace lk {
namespace {

// MADV_COLLAPSE, of Linux 6.1; the C library's headers may be older.
constexpr int kCollapse = 25;

struct Area {
  int64_t size = 0;
  int descriptor = -1;  // of allocate_shared
  bool ours = true;     // false for another process's memory
};

// What a process can address. Sums of a few such numbers stay far from 2^63.
constexpr int64_t kMostBytes = int64_t{1} << 47;

struct Registry {
  std::mutex mutex;
  std::map<void*, Area> areas;
};

// The registry is never destroyed, because tensors may be released while the process exits.
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

// How many bytes of our allocations have pages already. This is slow (mincore writes a byte for
// each page), so it is called only where the sum of all allocations does not fit.
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

[[noreturn]] void throw_out_of_memory(int64_t asked, int64_t promised, int64_t available) {
  std::string text = "cannot allocate " + gib(asked) + " for expert weights: " + gib(available) +
                     " of memory are free";
  if (promised > 0) text += ", of which " + gib(promised) + " are promised to earlier weights";
  throw OutOfMemory(text);
}

// Throws OutOfMemory unless so many bytes are free. mmap promises more memory than there is, and
// the kernel kills the process when it cannot keep the promise. So this checks it before a minute
// of loading. The caller holds the mutex.
void check_room(const Registry& all, int64_t bytes) {
  const int64_t available = available_bytes();
  int64_t promised = 0;
  for (const auto& [memory, area] : all.areas) promised += area.ours ? area.size : 0;
  if (promised + bytes <= available) return;
  promised = std::max<int64_t>(0, promised - resident_bytes(all.areas));
  if (bytes > available - promised) throw_out_of_memory(bytes, promised, available);
}

// A range of addresses without memory, aligned to a huge page; null if there is none.
char* reserve_addresses(int64_t size) {
  // The range is one huge page longer at first, and what is not needed at its ends is given back.
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

[[noreturn]] void throw_mapping_error(const char* what, int64_t bytes) {
  throw std::runtime_error("cannot " + std::string(what) + " " + gib(bytes) +
                           " of shared memory: " + std::strerror(errno));
}

// Maps the file at a new range of addresses; null if that fails.
char* map_file(int descriptor, int64_t size, int protection) {
  char* memory = reserve_addresses(size);
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

int64_t RowLayout::bytes() const {
  int64_t product = 1;
  for (const int64_t number : {experts, parts, rows, row_bytes}) {
    if (number < 1) {
      throw std::invalid_argument("a bank of " + std::to_string(experts) + " experts x " +
                                  std::to_string(parts) + " parts x " + std::to_string(rows) +
                                  " rows x " + std::to_string(row_bytes) +
                                  " bytes: positive numbers are wanted");
    }
    if (number > kMostBytes / product) {
      throw OutOfMemory("cannot allocate more than " + gib(kMostBytes) + " for expert weights");
    }
    product *= number;
  }
  if (experts > kMostBlocks / parts) {
    throw std::invalid_argument("a bank of " + std::to_string(experts) + " experts x " +
                                std::to_string(parts) + " parts: at most " +
                                std::to_string(kMostBlocks) + " of both together are allowed");
  }
  return product;
}

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
  // machine, where page walks are slowest). Rows on another socket are read at roughly half speed.
  // So the two cost the same where between an eighth and a fifth of the rows are on the wrong node;
  // this is an estimate, not a measurement.
  const std::vector<Extent> huge = plan_placement(layout, node_workers, kHugePage);
  const int64_t cross = cross_node_bytes(layout, node_workers, huge);
  return cross > layout.bytes() / 8 ? kSmallPage : kHugePage;
}

void* allocate(int64_t bytes, int64_t page_bytes) {
  const int64_t size = round_up(std::max<int64_t>(bytes, 1), kHugePage);
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  check_room(all, bytes);
  char* memory = reserve_addresses(size);
  if (memory == nullptr || mprotect(memory, size, PROT_READ | PROT_WRITE) != 0) {
    if (memory != nullptr) munmap(memory, size);
    throw_out_of_memory(bytes, 0, available_bytes());
  }
  // With 4 KiB pages, walks of the page table cost time: on one Zen 5 core, 1 token of
  // Qwen3-30B-A3B's shape in bf16 took 2.7 ms, and 2.2 ms with huge pages. The last huge page is
  // not full, so it is left in small pages: then no more becomes resident than was asked for.
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
  if (descriptor < 0) throw_mapping_error("create", bytes);
  char* memory = nullptr;
  if (ftruncate(descriptor, size) == 0) {
    memory = map_file(descriptor, size, PROT_READ | PROT_WRITE);
  }
  if (memory == nullptr) {
    const int error = errno;
    close(descriptor);
    errno = error;
    throw_mapping_error("map", bytes);
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
  if (fstat(descriptor, &file) != 0) throw_mapping_error("map", bytes);
  if (bytes < 1 || file.st_size < bytes || bytes % kHugePage != 0) {
    throw std::runtime_error("shared memory of " + std::to_string(file.st_size) + " bytes, not " +
                             std::to_string(bytes));
  }
  char* memory = map_file(descriptor, bytes, PROT_READ);
  if (memory == nullptr) throw_mapping_error("map", bytes);
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
  // An mbind for each expert's share would split the mapping into more areas than the kernel allows
  // a process (vm.max_map_count, 65530), so the touching thread asks for the node.
  const OnNode here(node);
  for (int64_t at = extent.begin; at < extent.end; at += page_bytes) {
    static_cast<volatile char*>(memory)[at] = 0;
  }
}

bool make_huge(void* memory, const Extent& extent) {
  // The kernel's setting for huge pages in shared memory (shmem_enabled) is "never" nearly
  // everywhere. MADV_COLLAPSE works whatever the setting is, but refuses a range without any page.
  const int64_t begin = round_up(extent.begin, kHugePage);
  const int64_t end = extent.end / kHugePage * kHugePage;
  return end <= begin || madvise(static_cast<char*>(memory) + begin, end - begin, kCollapse) == 0;
}

int64_t allocated_bytes() {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  int64_t sum = 0;
  for (const auto& [memory, area] : all.areas) sum += area.ours ? area.size : 0;
  return sum;
}

}  // namespace lk

#include "lk/nodes.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "lk/topology.h"

namespace lk {
namespace {

// These are from <linux/mempolicy.h>. libnuma would be one more package that users have to install.
constexpr int kPreferred = 1;
constexpr int kInterleave = 3;

// Masks of nodes have a bit for every number that the kernel can give a node, on any architecture
// (its NODES_SHIFT is at most 10).
constexpr int kNodeNumbers = 1024;
constexpr int kCpuNumbers = 8192;
constexpr int kMaskBits = 8 * sizeof(unsigned long);

std::vector<unsigned long> mask_of(const std::vector<int>& numbers, int size) {
  std::vector<unsigned long> mask(size / kMaskBits);
  for (int number : numbers) {
    if (number < size) mask[number / kMaskBits] |= 1UL << (number % kMaskBits);
  }
  return mask;
}

std::vector<int> cpus_of(int node) {
  std::ifstream file("/sys/devices/system/node/node" + std::to_string(node) + "/cpulist");
  std::string list;
  std::getline(file, list);
  return parse_cpu_list(list);
}

}  // namespace

OnNode::OnNode(int node) : before_(kNodeNumbers / kMaskBits) {
  const Mask mask = mask_of({node}, kNodeNumbers);
  if (syscall(SYS_get_mempolicy, &policy_, before_.data(), kNodeNumbers, nullptr, 0) == 0 &&
      syscall(SYS_set_mempolicy, kPreferred, mask.data(), kNodeNumbers) == 0) {
    way_ = Way::kPolicy;
    return;
  }
  // Without a policy, the kernel prefers the node of the CPU that touches the page.
  before_.assign(kCpuNumbers / kMaskBits, 0);
  const Mask cpus = mask_of(cpus_of(node), kCpuNumbers);
  if (syscall(SYS_sched_getaffinity, 0, kCpuNumbers / 8, before_.data()) > 0 &&
      syscall(SYS_sched_setaffinity, 0, kCpuNumbers / 8, cpus.data()) == 0) {
    way_ = Way::kCpus;
  }
}

OnNode::~OnNode() {
  if (way_ == Way::kPolicy) {
    syscall(SYS_set_mempolicy, policy_, before_.data(), kNodeNumbers);
  } else if (way_ == Way::kCpus) {
    syscall(SYS_sched_setaffinity, 0, kCpuNumbers / 8, before_.data());
  }
}

void interleave(void* memory, int64_t bytes, const std::vector<int>& nodes) {
  // The whole bank is one mapping with one policy, so this does not come near vm.max_map_count.
  const std::vector<unsigned long> mask = mask_of(nodes, kNodeNumbers);
  if (syscall(SYS_mbind, memory, bytes, kInterleave, mask.data(), kNodeNumbers, 0) == 0) return;
  const int error = errno;
  throw std::runtime_error(
      "cannot interleave " + std::to_string(bytes >> 20) + " MiB over " +
      std::to_string(nodes.size()) + " NUMA nodes: mbind: " + std::strerror(error) +
      (error == EPERM ? "; a container needs `docker run --cap-add SYS_NICE` for this" : ""));
}

std::vector<int> memory_nodes() {
  std::ifstream status("/proc/thread-self/status");
  constexpr std::string_view kField = "Mems_allowed_list:\t";
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(kField)) return parse_cpu_list(line.substr(kField.size()));
  }
  return {0};  // a kernel without NUMA
}

std::vector<int> page_nodes(const std::vector<const void*>& addresses) {
  std::vector<void*> pages;
  for (const void* address : addresses) pages.push_back(const_cast<void*>(address));
  std::vector<int> status(pages.size(), -1);
  syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, status.data(), 0);
  for (int& node : status) node = std::max(node, -1);
  return status;
}

}  // namespace lk

// How much memory the machine, this process's memory cgroup, and each NUMA node have left. Page
// cache counts as free, because the kernel gives it up when memory is needed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lk {

// Bytes that the machine, or the memory cgroup that this process is in, can still give. Tests pass
// a `root` with files of their own.
int64_t available_bytes(const std::string& root = "");

// All memory of the machine in bytes, or 0 if the kernel does not tell.
int64_t machine_bytes();

struct NodeMemory {
  int id = 0;  // the kernel's number of the node
  int64_t total_bytes = 0;
  int64_t free_bytes = 0;
  // The kernel's distances from this node to all nodes of the list, in its order: 10 is a node from
  // itself. Empty if the kernel does not tell.
  std::vector<int> distances;
};

// The NUMA nodes in <sysfs>/devices/system/node, by rising number, whether or not this process may
// use their memory. Empty without NUMA information.
std::vector<NodeMemory> node_memory(const std::string& sysfs);

}  // namespace lk

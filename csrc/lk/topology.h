// Where to run: NUMA nodes, their physical cores and SMT siblings, as this process may use them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lk {

// The most NUMA nodes that workers may be on. Phase has a queue for each, in memory that every call
// initialises.
constexpr int kMaxNodes = 64;

// One physical core: the logical CPUs on it that this process may use, lowest number first.
struct Core {
  std::vector<int> cpus;
};

struct Node {
  int id = 0;               // the kernel's number of the node
  std::vector<Core> cores;  // empty for a node with memory but no usable core
  int64_t memory_bytes = 0;
};

struct Topology {
  std::vector<Node> nodes;
  // A made-up machine for tests: its CPUs do not exist, so no thread is pinned and no page placed.
  bool synthetic = false;

  int core_count() const;
  int cpu_count() const;
};

// Parses the kernel's list format, "0-3,8". Throws std::invalid_argument on anything else.
std::vector<int> parse_cpu_list(const std::string& text);

// The CPUs of this thread's affinity mask. The kernel has already intersected it with the cgroup's
// cpuset, so the cgroup files need not be read.
std::vector<int> allowed_cpus();

// Reads <sysfs>/devices/system/{node,cpu}. CPUs outside `allowed` are dropped; a node that loses
// all its cores stays as a memory-only node. Without NUMA information everything is one node.
Topology detect_topology(const std::string& sysfs, const std::vector<int>& allowed);

// "2 nodes x 3 cores x 2 threads"; cores may differ, "3 nodes x 4,2,0 cores x 1 threads".
// Throws std::invalid_argument naming the text and the form.
Topology parse_topology(const std::string& text);

// The same machine with only these CPUs. Throws std::invalid_argument if one is not there.
Topology restrict_topology(const Topology& topology, const std::vector<int>& cpus);

}  // namespace lk

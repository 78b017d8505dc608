// The NUMA nodes, physical cores and SMT siblings that this process may use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lk {

// The most NUMA nodes that workers may be on. Each has at least one of Phase's queues, of which
// there are as many as a word has bits.
constexpr int kMaxNodes = 64;

// A physical core: the logical CPUs on it that this process may use, lowest number first.
struct Core {
  std::vector<int> cpus;
};

struct Node {
  int id = 0;               // the kernel's number of the node
  std::vector<Core> cores;  // empty for a node without usable cores, which may still have memory
  int64_t memory_bytes = 0;
};

struct Topology {
  std::vector<Node> nodes;
  // Whether the machine is made up for tests. Its CPUs do not exist, so no thread is pinned and no
  // page is placed.
  bool synthetic = false;

  int core_count() const;
  int cpu_count() const;
};

// Parses the kernel's list format, "0-3,8". Throws std::invalid_argument on anything else.
std::vector<int> parse_cpu_list(const std::string& text);

// The CPUs of this thread's affinity mask. The kernel has already intersected it with the cgroup's
// cpuset, so the cgroup files need not be read.
std::vector<int> allowed_cpus();

// Reads <sysfs>/devices/system/{node,cpu}. CPUs outside `allowed` are dropped. A node that loses
// all its cores stays as a node with memory only. Without NUMA information everything is one node.
Topology detect_topology(const std::string& sysfs, const std::vector<int>& allowed);

// Makes up a machine from "2 nodes x 3 cores x 2 threads" or, if nodes differ, from
// "3 nodes x 4,2,0 cores x 1 threads". Throws std::invalid_argument for any other form.
Topology parse_topology(const std::string& text);

// The same machine with only these CPUs. Throws std::invalid_argument if it lacks one of them.
Topology restrict_topology(const Topology& topology, const std::vector<int>& cpus);

}  // namespace lk

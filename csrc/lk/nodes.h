// On which NUMA nodes the kernel makes pages. All nodes are the kernel's numbers.
//
// Docker's default seccomp profile refuses the system calls for memory policies to containers
// without CAP_SYS_NICE. Only interleaving cannot do without them.
#pragma once

#include <cstdint>
#include <vector>

namespace lk {

// While one exists, the kernel makes the pages that this thread touches first on `node` or, if that
// is full, near it.
class OnNode {
 public:
  explicit OnNode(int node);
  ~OnNode();
  OnNode(const OnNode&) = delete;
  OnNode& operator=(const OnNode&) = delete;

 private:
  enum class Way { kPolicy, kCpus, kNone };
  // Bits for every CPU (8192 is the most that Linux supports on x86) or every node.
  using Mask = std::vector<unsigned long>;

  Way way_ = Way::kNone;
  int policy_ = 0;
  Mask before_;
};

// Lets the kernel make the pages that do not exist yet on the nodes round-robin, whichever thread
// writes them first. Throws std::runtime_error if the kernel refuses.
void interleave(void* memory, int64_t bytes, const std::vector<int>& nodes);

// The nodes whose memory this process may use, including nodes without CPUs.
std::vector<int> memory_nodes();

// The node that has the page at each address; -1 for pages that do not exist yet.
std::vector<int> page_nodes(const std::vector<const void*>& addresses);

}  // namespace lk

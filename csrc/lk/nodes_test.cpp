#include "lk/nodes.h"

#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "lk/memory.h"
#include "lk/topology.h"

namespace lk {
namespace {

// Refuses the calls for memory policies to this thread, as Docker's default seccomp profile does.
bool refuse_policies() {
  sock_filter steps[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mbind, 3, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_get_mempolicy, 2, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_set_mempolicy, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
  };
  sock_fprog program{static_cast<unsigned short>(std::size(steps)), steps};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

// Ends the process with an exit code for what is wrong.
void expect(bool right, int code) {
  if (!right) std::_Exit(code);
}

constexpr int kPages = 16;

void place_pages_without_policies() {
  const std::vector<int> nodes = memory_nodes();
  const std::vector<int> cpus = allowed_cpus();
  expect(refuse_policies(), 1);
  expect(syscall(SYS_set_mempolicy, 0, nullptr, 0) == -1 && errno == EPERM, 2);
  expect(memory_nodes() == nodes, 3);
  for (const Node& node : detect_topology("/sys", cpus).nodes) {
    if (node.cores.empty()) continue;
    auto* memory = static_cast<char*>(allocate(kPages * kSmallPage, kSmallPage));
    touch_on_node(memory, {0, kPages * kSmallPage, 0}, node.id);
    for (int page = 0; page < kPages; ++page) {
      expect(page_nodes({memory + page * kSmallPage}) == std::vector<int>{node.id}, 4);
    }
    const OnNode here(node.id);
    for (int cpu : allowed_cpus()) {
      bool ours = false;
      for (const Core& core : node.cores) {
        for (int of_node : core.cpus) ours = ours || of_node == cpu;
      }
      expect(ours, 5);
    }
    release(memory);
  }
  expect(allowed_cpus() == cpus, 6);
  try {
    interleave(allocate(kHugePage), kHugePage, nodes);
    std::_Exit(7);
  } catch (const std::runtime_error& error) {
    std::fputs(error.what(), stderr);
  }
  std::_Exit(0);
}

TEST(Nodes, PlacesPagesInAContainerThatRefusesMemoryPolicies) {
  EXPECT_EXIT(place_pages_without_policies(), testing::ExitedWithCode(0), "--cap-add SYS_NICE");
}

}  // namespace
}  // namespace lk

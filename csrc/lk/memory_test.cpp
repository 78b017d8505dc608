#include "lk/memory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <sstream>
#include <string>
#include <utility>

#include "lk/nodes.h"
#include "lk/rows.h"
#include "lk/thread_pool.h"
#include "lk/topology.h"

namespace lk {
namespace {

// The node that owns a byte according to the plan.
int owner(const std::vector<Extent>& extents, int64_t byte) {
  for (const Extent& extent : extents) {
    if (byte >= extent.begin && byte < extent.end) return extent.node;
  }
  return -1;
}

struct PlacementCase {
  RowLayout layout;
  std::vector<int> workers;
  int64_t page;
};

void PrintTo(const PlacementCase& c, std::ostream* out) {
  *out << c.layout.experts << " experts of " << c.layout.parts << " x " << c.layout.rows << " x "
       << c.layout.row_bytes << " bytes on " << c.workers.size() << " nodes";
}

class Placement : public testing::TestWithParam<PlacementCase> {};

TEST_P(Placement, CoversTheBankAndFollowsTheRows) {
  const auto& [layout, workers, page] = GetParam();
  const std::vector<Extent> extents = plan_placement(layout, workers, page);
  int64_t at = 0;
  for (const Extent& extent : extents) {
    EXPECT_EQ(extent.begin, at);
    EXPECT_GT(extent.end, extent.begin);
    if (extent.end != layout.bytes()) {
      EXPECT_EQ(extent.end % page, 0);
    }
    at = extent.end;
  }
  EXPECT_EQ(at, layout.bytes());

  // A page belongs to the node that computes the row at its middle.
  const std::vector<int64_t> bounds = divide_rows(layout.rows, workers);
  for (int64_t byte = page / 2; byte < layout.bytes(); byte += page) {
    const int64_t row = byte / layout.row_bytes % layout.rows;
    int node = 0;
    while (row >= bounds[node + 1]) ++node;
    EXPECT_EQ(owner(extents, byte), node) << "byte " << byte;
  }
}

// Compares cross_node_bytes with a count row by row. The bytes are at most half a page for each
// bound between two nodes.
TEST_P(Placement, PutsLittleOnTheWrongNode) {
  const auto& [layout, workers, page] = GetParam();
  const std::vector<int64_t> rows = divide_rows(layout.rows, workers);
  const std::vector<Extent> extents = plan_placement(layout, workers, page);
  int64_t cross = 0;
  int64_t bounds = 0;
  size_t at = 0;
  int last = -1;
  for (int64_t row = 0; row < layout.experts * layout.parts * layout.rows; ++row) {
    int node = 0;
    while (row % layout.rows >= rows[node + 1]) ++node;
    if (last >= 0 && node != last) ++bounds;
    last = node;
    for (int64_t byte = row * layout.row_bytes; byte < (row + 1) * layout.row_bytes; ++byte) {
      if (byte == extents[at].end) ++at;
      if (extents[at].node != node) ++cross;
    }
  }
  EXPECT_EQ(cross_node_bytes(layout, workers, extents), cross);
  EXPECT_LE(cross, bounds * page / 2);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, Placement,
    testing::Values(PlacementCase{{4, 2, 768, 4096}, {1}, kHugePage},
                    PlacementCase{{4, 2, 768, 4096}, {2, 2}, kHugePage},
                    PlacementCase{{3, 1, 2048, 1536}, {3, 1}, 4096},
                    PlacementCase{{5, 2, 33, 2 * 47}, {1, 1, 1, 1, 1, 1, 1, 1}, 4096},
                    PlacementCase{{1, 1, 7168, 4096}, std::vector<int>(32, 1), kHugePage},
                    PlacementCase{{2, 1, 3, 100}, {4, 0, 4}, 4096},
                    PlacementCase{{2, 1, 130, 57}, {1, 1, 1}, 4096}));

// The experts of two real models on 1, 2, 4, 8 and 32 nodes: w13 and w2, in bf16 and in 4 bits.
TEST(Placement, OfRealShapes) {
  for (const auto& [hidden, intermediate] :
       {std::pair<int64_t, int64_t>{2048, 768}, {7168, 2048}}) {
    for (int nodes : {1, 2, 4, 8, 32}) {
      const std::vector<int> workers(nodes, 8);
      for (int64_t bits : {16, 4}) {
        for (const RowLayout& layout : {RowLayout{16, 2, intermediate, hidden * bits / 8},
                                        RowLayout{16, 1, hidden, intermediate * bits / 8}}) {
          const int64_t page = placement_page(layout, workers);
          const int64_t cross =
              cross_node_bytes(layout, workers, plan_placement(layout, workers, page));
          if (nodes == 1) {
            EXPECT_EQ(page, kHugePage);
            EXPECT_EQ(cross, 0);
          }
          EXPECT_LE(cross, layout.bytes() / 8)
              << layout.rows << " x " << layout.row_bytes << " bytes on " << nodes << " nodes";
        }
      }
    }
  }
}

TEST(PlacementPage, HugeOnlyWhereANodeOwnsManyOfThem) {
  // In bf16, half of one part of w13 is 14 MiB for DeepSeek-V3 and 1.5 MiB for Qwen3-30B-A3B.
  EXPECT_EQ(placement_page({8, 2, 2048, 14336}, {8, 8}), kHugePage);
  EXPECT_EQ(placement_page({8, 2, 768, 4096}, {8, 8}), kSmallPage);
}

TEST(Allocate, ZeroedAlignedAndCounted) {
  const int64_t before = allocated_bytes();
  auto* memory = static_cast<char*>(allocate(3 * kHugePage / 2));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(memory) % kHugePage, 0u);
  EXPECT_EQ(allocated_bytes() - before, 2 * kHugePage);
  EXPECT_EQ(memory[0], 0);
  EXPECT_EQ(memory[3 * kHugePage / 2 - 1], 0);
  std::memset(memory, 1, 3 * kHugePage / 2);
  release(memory);
  EXPECT_EQ(allocated_bytes(), before);
  release(memory);  // not ours any more: nothing happens
}

TEST(Allocate, PagesComeWhenTouchedAndOnTheNodeAskedFor) {
  const int node = detect_topology("/sys", allowed_cpus()).nodes.front().id;
  auto* memory = static_cast<char*>(allocate(4 * kHugePage));
  const std::vector<const void*> pages{memory, memory + kHugePage, memory + 3 * kHugePage};
  EXPECT_EQ(page_nodes(pages), (std::vector<int>{-1, -1, -1}));
  touch_on_node(memory, {kHugePage, 2 * kHugePage, 0}, node);
  EXPECT_EQ(page_nodes(pages), (std::vector<int>{-1, node, -1}));
  release(memory);
}

TEST(Allocate, SmallPagesOnRequest) {
  auto* memory = static_cast<char*>(allocate(2 * kHugePage, kSmallPage));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(memory) % kHugePage, 0u);
  memory[0] = 1;
  EXPECT_EQ(page_nodes({memory + kSmallPage}), (std::vector<int>{-1}));  // not of the same page
  release(memory);
}

// Places banks as allocate_bank does, and reads the node of each page back.
TEST(Allocate, EveryPageLiesWhereThePlanSays) {
  const Topology machine = detect_topology("/sys", allowed_cpus());
  const PoolPlan plan = plan_pool(machine, {});
  for (const RowLayout& layout : {RowLayout{5, 2, 768, 1024}, RowLayout{3, 1, 2048, 1536}}) {
    const int64_t page = placement_page(layout, plan.node_workers);
    const std::vector<Extent> extents = plan_placement(layout, plan.node_workers, page);
    auto* memory = static_cast<char*>(allocate(layout.bytes(), page));
    std::vector<const void*> pages;
    std::vector<int> wanted;
    for (const Extent& extent : extents) {
      touch_on_node(memory, extent, plan.nodes[extent.node]);
      for (int64_t at = extent.begin; at < extent.end; at += kSmallPage) {
        pages.push_back(memory + at);
        wanted.push_back(plan.nodes[extent.node]);
      }
    }
    EXPECT_EQ(page_nodes(pages), wanted);
    release(memory);
  }
}

TEST(Shared, OthersSeeWhatTheOwnerWritesAndItCountsOnce) {
  const int64_t before = allocated_bytes();
  auto* memory = static_cast<char*>(allocate_shared(3 * kHugePage / 2));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(memory) % kHugePage, 0u);
  EXPECT_EQ(allocated_bytes() - before, 2 * kHugePage);
  EXPECT_EQ(memory[3 * kHugePage / 2 - 1], 0);
  const SharedPlace place = shared_place(memory + kHugePage + 5);
  EXPECT_EQ(place.offset, kHugePage + 5);
  EXPECT_EQ(place.bytes, 2 * kHugePage);
  auto* other = static_cast<char*>(map_shared(place.descriptor, place.bytes));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(other) % kHugePage, 0u);
  EXPECT_NE(other, memory);
  memory[place.offset] = 42;
  EXPECT_EQ(other[place.offset], 42);
  EXPECT_EQ(allocated_bytes() - before, 2 * kHugePage);
  EXPECT_THROW(shared_place(other), std::invalid_argument);  // its owner's alone to hand on
  // The memory outlives the owner's mapping.
  release(memory);
  EXPECT_EQ(allocated_bytes(), before);
  EXPECT_EQ(other[place.offset], 42);
  EXPECT_EQ(fcntl(place.descriptor, F_GETFD), -1);
  release(other);
}

TEST(Shared, OnlyTheOwnerCanWrite) {
  auto* memory = static_cast<char*>(allocate_shared(kHugePage));
  const SharedPlace place = shared_place(memory);
  auto* other = static_cast<char*>(map_shared(place.descriptor, place.bytes));
  const pid_t child = fork();
  if (child == 0) {
    std::signal(SIGSEGV, [](int) { _exit(7); });
    *static_cast<volatile char*>(other) = 1;
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 7) << status;
  release(other);
  release(memory);
}

TEST(Shared, WrongPlacesAndSizesAreErrors) {
  auto* plain = static_cast<char*>(allocate(kHugePage));
  auto* memory = static_cast<char*>(allocate_shared(kHugePage));
  int local = 0;
  EXPECT_THROW(shared_place(plain), std::invalid_argument);
  EXPECT_THROW(shared_place(&local), std::invalid_argument);
  const SharedPlace place = shared_place(memory);
  EXPECT_THROW(map_shared(place.descriptor, 2 * place.bytes), std::runtime_error);
  EXPECT_THROW(map_shared(-1, place.bytes), std::runtime_error);
  EXPECT_THROW(allocate_shared(int64_t{1} << 50), OutOfMemory);
  release(memory);
  release(plain);
}

// How many bytes of the mapping at `memory` are in huge pages of shared memory.
int64_t huge_bytes_at(const char* memory) {
  std::ostringstream begin;
  begin << std::hex << reinterpret_cast<uintptr_t>(memory) << "-";
  std::ifstream file("/proc/self/smaps");
  bool here = false;
  for (std::string line; std::getline(file, line);) {
    if (line.find("-") < line.find(" ")) here = line.rfind(begin.str(), 0) == 0;
    if (here && line.rfind("ShmemPmdMapped:", 0) == 0) return std::stoll(line.substr(15)) * 1024;
  }
  return -1;
}

TEST(Shared, HugePagesForAllProcessesFromATouchedByteEach) {
  const int node = detect_topology("/sys", allowed_cpus()).nodes.front().id;
  auto* memory = static_cast<char*>(allocate_shared(9 * kHugePage / 2));
  const Extent extent{0, 9 * kHugePage / 2, 0};
  touch_on_node(memory, extent, node, kHugePage);
  EXPECT_EQ(page_nodes({memory + kSmallPage}), (std::vector<int>{-1}));
  if (!make_huge(memory, extent)) {
    release(memory);
    GTEST_SKIP() << "the kernel makes no huge pages of shared memory, or has none free";
  }
  EXPECT_EQ(page_nodes({memory + kSmallPage, memory + 4 * kHugePage - 1}),
            (std::vector<int>{node, node}));
  EXPECT_EQ(huge_bytes_at(memory), 4 * kHugePage);
  memory[4 * kHugePage - 1] = 5;
  const SharedPlace place = shared_place(memory);
  auto* other = static_cast<char*>(map_shared(place.descriptor, place.bytes));
  for (int64_t at = kHugePage - 1; at < 4 * kHugePage; at += kHugePage) {
    EXPECT_EQ(other[at], at == 4 * kHugePage - 1 ? 5 : 0);
  }
  EXPECT_EQ(huge_bytes_at(other), 4 * kHugePage);
  release(other);
  release(memory);
}

// The kernel's memory policy for an address: its number and its nodes.
std::pair<int, std::vector<int>> policy_of(void* address) {
  constexpr int kNodeNumbers = 1024;
  constexpr int kOfAddress = 2;
  std::vector<unsigned char> mask(kNodeNumbers / 8);
  int policy = -1;
  syscall(SYS_get_mempolicy, &policy, mask.data(), kNodeNumbers, address, kOfAddress);
  std::vector<int> nodes;
  for (int node = 0; node < kNodeNumbers; ++node) {
    if (mask[node / 8] >> (node % 8) & 1) nodes.push_back(node);
  }
  return {policy, nodes};
}

// Pages come to all nodes round-robin, whichever thread writes them.
TEST(Allocate, InterleavesOverAllNodes) {
  const std::vector<int> nodes = memory_nodes();
  ASSERT_FALSE(nodes.empty());
  const auto pages = static_cast<int64_t>(4 * nodes.size());
  auto* memory = static_cast<char*>(allocate(pages * kHugePage));
  auto* other = static_cast<char*>(allocate(kHugePage));
  interleave(memory, pages * kHugePage, nodes);
  constexpr int kInterleave = 3;
  EXPECT_EQ(policy_of(memory), std::pair(kInterleave, nodes));
  EXPECT_EQ(policy_of(memory + pages * kHugePage - 1), std::pair(kInterleave, nodes));
  EXPECT_NE(policy_of(other).first, kInterleave);
  EXPECT_EQ(page_nodes({memory}), std::vector<int>{-1});  // still none
  std::map<int, int64_t> count;
  for (int64_t page = 0; page < pages; ++page) {
    memory[page * kHugePage] = 1;
    ++count[page_nodes({memory + page * kHugePage})[0]];
  }
  for (int node : nodes) EXPECT_EQ(count[node], 4) << "node " << node;
  release(memory);
  release(other);
}

TEST(Allocate, InterleavingOverNoNodeIsAnError) {
  auto* memory = static_cast<char*>(allocate(kHugePage));
  EXPECT_THROW(interleave(memory, kHugePage, {}), std::runtime_error);
  release(memory);
}

TEST(Allocate, RefusesWhatTheMachineCannotHold) {
  try {
    allocate(int64_t{1} << 50);
    FAIL() << "a petabyte was allocated";
  } catch (const OutOfMemory& error) {
    EXPECT_NE(std::string(error.what()).find("1048576.00 GiB"), std::string::npos) << error.what();
  }
}

TEST(RowLayout, RefusesNumbersWithoutASumOfBytes) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  EXPECT_EQ((RowLayout{3, 2, 5, 7}.bytes()), 3 * 2 * 5 * 7);
  EXPECT_THROW((RowLayout{kMost, 1, 1, 1}.bytes()), OutOfMemory);
  EXPECT_EQ((RowLayout{kMostBlocks / 2, 2, 1, 1}.bytes()), kMostBlocks);
  EXPECT_THROW((RowLayout{kMostBlocks / 2 + 1, 2, 1, 1}.bytes()), std::invalid_argument);
  EXPECT_THROW((RowLayout{1, kMostBlocks + 1, 1, 1}.bytes()), std::invalid_argument);
  EXPECT_THROW((RowLayout{1 << 30, 2, 1 << 30, 1 << 30}.bytes()), OutOfMemory);
  for (const int64_t wrong : {int64_t{0}, int64_t{-1}, -kMost}) {
    EXPECT_THROW((RowLayout{2, wrong, 5, wrong}.bytes()), std::invalid_argument);
  }
}

}  // namespace
}  // namespace lk

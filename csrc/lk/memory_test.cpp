#include "lk/memory.h"

#include <gtest/gtest.h>

#include <cstring>

#include "lk/rows.h"
#include "lk/thread_pool.h"
#include "lk/topology.h"

namespace lk {
namespace {

// Who owns a byte according to the plan.
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

  // A page belongs to the node that computes the row at its start.
  const std::vector<int64_t> bounds = divide_rows(layout.rows, workers);
  for (int64_t byte = 0; byte < layout.bytes(); byte += page) {
    const int64_t row = byte / layout.row_bytes % layout.rows;
    int node = 0;
    while (row >= bounds[node + 1]) ++node;
    EXPECT_EQ(owner(extents, byte), node) << "byte " << byte;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, Placement,
    testing::Values(PlacementCase{{4, 2, 768, 4096}, {1}, kHugePage},
                    PlacementCase{{4, 2, 768, 4096}, {2, 2}, kHugePage},
                    PlacementCase{{3, 1, 2048, 1536}, {3, 1}, 4096},
                    PlacementCase{{5, 2, 33, 2 * 47}, {1, 1, 1, 1, 1, 1, 1, 1}, 4096},
                    PlacementCase{{1, 1, 7168, 4096}, std::vector<int>(32, 1), kHugePage},
                    PlacementCase{{2, 1, 3, 100}, {4, 0, 4}, 4096}));

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

TEST(Allocate, RefusesWhatTheMachineCannotHold) {
  try {
    allocate(int64_t{1} << 50);
    FAIL() << "a petabyte was allocated";
  } catch (const OutOfMemory& error) {
    EXPECT_NE(std::string(error.what()).find("1048576.00 GiB"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace lk

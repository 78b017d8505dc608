// Where weights live: anonymous pages, or shared ones for several processes, huge where that helps,
// each row on the node that computes it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace lk {

class OutOfMemory : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// How the rows of a bank of experts are laid out: for each expert `parts` equal blocks of rows
// (gate and up of w13: 2; w2: 1), each block divided among the nodes.
struct RowLayout {
  int64_t experts = 1;
  int64_t parts = 1;
  int64_t rows = 1;  // in one part
  int64_t row_bytes = 1;

  int64_t bytes() const { return experts * parts * rows * row_bytes; }
};

// Bytes [begin, end) of a bank belong to a node (an index into the pool's nodes).
struct Extent {
  int64_t begin = 0;
  int64_t end = 0;
  int node = 0;
};

constexpr int64_t kSmallPage = int64_t{4} << 10;
constexpr int64_t kHugePage = int64_t{2} << 20;

// The division of a bank's pages. Extents cover the bank in order without gaps; bounds lie on
// pages: a page belongs to the node that owns its middle, so that at most half a page on each side
// of a bound between two nodes lies on the wrong one.
std::vector<Extent> plan_placement(const RowLayout& layout, const std::vector<int>& node_workers,
                                   int64_t page_bytes);

// Bytes of rows that such extents put on another node than the one that computes them.
int64_t cross_node_bytes(const RowLayout& layout, const std::vector<int>& node_workers,
                         const std::vector<Extent>& extents);

// The pages to place a bank in: huge ones unless they would put more than an eighth of it on the
// wrong nodes, as they do where a node's share of an expert is no larger than they are.
int64_t placement_page(const RowLayout& layout, const std::vector<int>& node_workers);

// Zeroed memory of at least `bytes`, starting on a huge page, in pages of kHugePage or kSmallPage.
// Pages come into being when first written. Throws OutOfMemory with what was asked and what is free
// if the machine (or the cgroup) cannot hold it beside what earlier allocations still may grow to.
void* allocate(int64_t bytes, int64_t page_bytes = kHugePage);

// The same in pages that other processes can map by a descriptor. They have no name: the last
// process that maps them takes them along, however it ends. In small pages until made huge.
// Throws std::runtime_error, too, if the process may open no more files.
void* allocate_shared(int64_t bytes);

// Where `address` lies in memory of allocate_shared. Throws std::invalid_argument elsewhere.
struct SharedPlace {
  int descriptor = -1;  // open until release
  int64_t offset = 0;
  int64_t bytes = 0;  // of the whole
};
SharedPlace shared_place(const void* address);

// Such memory of another process, read-only. Throws std::runtime_error if it is smaller.
void* map_shared(int descriptor, int64_t bytes);

// Takes what one of these gave.
void release(void* memory);

// Touches a byte of every page (of page_bytes) of the extent so that they come to lie on `node`
// (the kernel's number), or, if that is full, near it.
void touch_on_node(void* memory, const Extent& extent, int node, int64_t page_bytes = kSmallPage);

// Makes huge pages of the whole ones in an extent, whose first bytes have been touched: each on
// that byte's node. False if the kernel cannot, or not all of them; the memory is good all the
// same.
bool make_huge(void* memory, const Extent& extent);

// Makes pages that do not exist yet come to lie on the nodes in turns, whoever writes them first.
// Throws std::runtime_error if the kernel refuses.
void interleave(void* memory, int64_t bytes, const std::vector<int>& nodes);

// The kernel's numbers of the nodes whose memory this process may use, with CPUs or without.
std::vector<int> memory_nodes();

// The kernel's node number of the page at each address, -1 for one not touched yet.
std::vector<int> page_nodes(const std::vector<const void*>& addresses);

// Bytes handed out and not released, without what other processes own.
int64_t allocated_bytes();

}  // namespace lk

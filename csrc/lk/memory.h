// Memory for weights: anonymous pages or pages that several processes share, huge pages where they
// help, and each row on the NUMA node that computes it.
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

// Blocks of a bank, experts times parts. No model comes near: placing the pages takes time and
// memory for each block and node.
constexpr int64_t kMostBlocks = int64_t{1} << 17;

// The layout of a bank, which holds one matrix of all experts: for each expert `parts` blocks of
// `rows` rows (w13 has two, gate and up; w2 has one). Each block is divided among the nodes.
struct RowLayout {
  int64_t experts = 1;
  int64_t parts = 1;
  int64_t rows = 1;  // in one part
  int64_t row_bytes = 1;

  // Throws std::invalid_argument for a number that is not positive or for more than kMostBlocks
  // blocks, and OutOfMemory for more bytes than a process can address.
  int64_t bytes() const;
};

// Bytes [begin, end) of a bank belong to `node`, an index into the pool's nodes.
struct Extent {
  int64_t begin = 0;
  int64_t end = 0;
  int node = 0;
};

constexpr int64_t kSmallPage = int64_t{4} << 10;
constexpr int64_t kHugePage = int64_t{2} << 20;

// Divides the pages of a bank among nodes. The extents cover the bank in order and without gaps. A
// page belongs to the node that owns its middle, so that at most half a page on each side of a
// bound between two nodes is on the wrong node.
std::vector<Extent> plan_placement(const RowLayout& layout, const std::vector<int>& node_workers,
                                   int64_t page_bytes);

// How many bytes of rows these extents put on another node than the one that computes them.
int64_t cross_node_bytes(const RowLayout& layout, const std::vector<int>& node_workers,
                         const std::vector<Extent>& extents);

// The size of pages for a bank: huge pages, unless they would put more than an eighth of it on the
// wrong nodes. That happens where a node's share of an expert is no larger than a huge page.
int64_t placement_page(const RowLayout& layout, const std::vector<int>& node_workers);

// Allocates at least `bytes` of zeroed memory in pages of kHugePage or kSmallPage, aligned to
// kHugePage. The kernel makes pages when they are first written. Throws OutOfMemory, with what was
// asked for and what is free, if the machine or the cgroup has too little memory for this and for
// the unwritten pages of earlier allocations.
void* allocate(int64_t bytes, int64_t page_bytes = kHugePage);

// Allocates memory that other processes can map by a descriptor. It has no name, so it is freed
// with the last process that maps it, however that process ends. Pages are small until make_huge().
// Also throws std::runtime_error if the process may not open more files.
void* allocate_shared(int64_t bytes);

// The place of `address` in memory of allocate_shared. Throws std::invalid_argument if it is not in
// such memory.
struct SharedPlace {
  int descriptor = -1;  // open until release()
  int64_t offset = 0;
  int64_t bytes = 0;  // of the whole allocation
};
SharedPlace shared_place(const void* address);

// Maps memory that another process allocated with allocate_shared, read-only. Throws
// std::runtime_error if it has fewer bytes.
void* map_shared(int descriptor, int64_t bytes);

// Frees memory of allocate() or allocate_shared(), or unmaps memory of map_shared().
void release(void* memory);

// Writes a byte to every page of `page_bytes` of the extent, so that the kernel makes these pages
// on `node` (the kernel's number) or, if that is full, near it.
void touch_on_node(void* memory, const Extent& extent, int node, int64_t page_bytes = kSmallPage);

// Makes huge pages of all that fit into an extent, each on the node of its first byte, which must
// have been touched. Returns false if the kernel did not make all of them; the memory can be used
// in either case.
bool make_huge(void* memory, const Extent& extent);

// Bytes that are allocated and not released, without the memory of other processes.
int64_t allocated_bytes();

}  // namespace lk

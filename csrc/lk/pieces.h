// How the rows of matrices are divided into pieces of work, and how large those are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "lk/integers.h"
#include "lk/kernels.h"
#include "lk/phase.h"
#include "lk/tiles.h"

namespace lk {

// Bytes of weights in one piece of work. A thread reads tiles faster if they follow each other in
// memory: pieces of 1 MiB take 3 to 7% less time at 1 and 4 tokens than pieces of 128 KiB, and 15
// to 23% less with int4, whose scales are a second stream.
constexpr int64_t kPieceBytes = 1 << 20;
// How many pieces each worker should get, so that no worker waits long for the last piece.
constexpr int64_t kPiecesPerWorker = 8;
// The most tokens that are multiplied with a tile at a time. Their sums, 48 KiB for each
// projection, stay in L2.
constexpr int64_t kTokenBlock = 192;
// Where rows of activations are copied, the copies of a block of tokens take so much of L2 at most.
constexpr int64_t kGatheredBytes = 1280 << 10;
// Bytes of weights that a thread prefetches while it waits for the others: a quarter of L2.
constexpr int64_t kIdleBytes = 256 << 10;
// Scratch memory of one pass. Larger batches take several passes over the weights.
constexpr int64_t kPassBytes = int64_t{256} << 20;

// The largest block of activations, of at most 2^most, whose size divides the group size; group 0
// means no groups.
inline int widest_block_log2(int64_t group, int most) {
  int log2 = most;
  while (log2 > kLeastActBlockLog2 && group % (int64_t{1} << log2) != 0) --log2;
  return log2;
}

// How many tokens of k activations are multiplied with a tile at a time.
inline int64_t token_block(const FormatKernels& format, int64_t k) {
  if (format.gather == nullptr) return kTokenBlock;
  return std::clamp<int64_t>(kGatheredBytes / format.act_row_bytes(k) / 32 * 32, 32, kTokenBlock);
}

// A piece of work: some rows of one matrix. It is empty if rows is 0.
struct Piece {
  int64_t active = 0;  // which matrix; of experts, an index into Workspace::active
  int64_t row = 0;
  int64_t rows = 0;
};

// The rows of one node, and how they are divided into pieces of one or several tiles. A piece is
// never a part of a tile: two threads that each read every other line of a tile took 1.5 times as
// long.
struct NodeRows {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t piece_rows = 1;

  // Chooses how large pieces are: small enough that each worker of the node gets kPiecesPerWorker
  // of `matrices` matrices, and at most kPieceBytes.
  void set_piece_rows(int64_t matrices, int workers, int64_t tile_bytes) {
    const int64_t worker_tiles = tile_count(end - begin) * matrices / (kPiecesPerWorker * workers);
    const int64_t most_tiles = kPieceBytes / tile_bytes;
    piece_rows = std::max<int64_t>(std::min(worker_tiles, most_tiles), 1) * kTileRows;
  }

  int64_t pieces() const { return ceil_div(end - begin, piece_rows); }  // of one expert
  Piece piece(int64_t index) const {
    const int64_t row = begin + index % pieces() * piece_rows;
    return {index / pieces(), row, std::min(piece_rows, end - row)};
  }
};

// Prefetches weights into L2 while a thread has nothing else to do.
class IdlePrefetch {
 public:
  explicit IdlePrefetch(std::span<const char> weights)
      : at_(weights.data()), end_(at_ + std::min<int64_t>(weights.size(), kIdleBytes)) {}

  // Prefetches the next 1 KiB. Returns false if nothing is left.
  bool operator()() {
    if (at_ >= end_) return false;
    for (int line = 0; line < 16; ++line, at_ += 64) __builtin_prefetch(at_, 0, 2);  // into L2
    return true;
  }

 private:
  const char* at_;
  const char* end_;
};

// Divides the rows of `matrices` matrices into pieces, and these among the teams of each node.
inline void divide_among_teams(const PoolPlan& plan, int64_t rows, int64_t matrices,
                               int64_t tile_bytes, Phase* phase, NodeRows* out) {
  const std::vector<int>& workers = plan.node_workers;
  for (int node = 0; node < static_cast<int>(workers.size()); ++node) {
    out[node].begin = first_row(rows, workers, node);
    out[node].end = first_row(rows, workers, node + 1);
    out[node].set_piece_rows(matrices, workers[node], tile_bytes);
  }
  for (size_t t = 0; t < plan.teams.size(); ++t) {
    const Team& team = plan.teams[t];
    const int64_t pieces = matrices * out[team.node].pieces();
    const int64_t all = workers[team.node];
    phase->set(static_cast<int>(t), pieces * team.first / all,
               pieces * (team.first + team.workers) / all);
  }
}

// Divides pieces that belong to no node among all teams. A single piece is the first team's.
inline void divide_evenly(const PoolPlan& plan, int64_t pieces, Phase* phase) {
  const auto teams = static_cast<int64_t>(plan.teams.size());
  for (int64_t t = 0; t < teams; ++t) {
    phase->set(static_cast<int>(t), ceil_div(pieces * t, teams), ceil_div(pieces * (t + 1), teams));
  }
}

// The claimed piece; `rows` are the rows of each node.
inline Piece piece_of(const PoolPlan& plan, const NodeRows* rows, Phase::Claim claim) {
  return claim.index < 0 ? Piece() : rows[plan.teams[claim.team].node].piece(claim.index);
}

// Packs a row of k numbers in 16 bits.
inline void pack_row(const Kernels& kernels, const FormatKernels& format, const uint16_t* x,
                     Scalar type, int64_t k, int block_log2, void* row) {
  constexpr int64_t kChunk = 256;
  float values[kChunk];
  for (int64_t at = 0; at < k; at += kChunk) {
    const int64_t n = std::min(kChunk, k - at);
    kernels.widen(x + at, type, n, values);
    format.pack(values, n, at, k, block_log2, row);
  }
}

}  // namespace lk

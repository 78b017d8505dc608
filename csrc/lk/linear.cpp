#include "lk/linear.h"

#include <algorithm>

#include "lk/integers.h"
#include "lk/phase.h"
#include "lk/pieces.h"
#include "lk/rows.h"

namespace lk {
namespace {

// One pass over the weights, for as many tokens as have room in the workspace.
class Pass {
 public:
  Pass(const LinearSpec& layer, const LinearBatch& batch, const Kernels& kernels, ThreadPool& pool,
       Workspace& workspace)
      : matrix_(layer.matrix),
        batch_(batch),
        kernels_(kernels),
        format_(kernels.of(layer.matrix.format)),
        pool_(pool),
        ws_(workspace),
        block_log2_(widest_block_log2(matrix_.group, format_.outlier_block_log2)),
        act_row_(format_.act_row_bytes(matrix_.k)),
        token_block_(token_block(format_, matrix_.k)) {}

  void run() {
    ws_.acts.resize(batch_.tokens * act_row_);
    ws_.workers.resize(pool_.size() * worker_bytes());
    plan();
    pool_.run(*this);
  }

  // What each worker does: its share of both phases.
  void operator()(int worker) {
    const PoolPlan& plan = pool_.plan();
    const int team = plan.workers[worker].team;
    using Claim = Phase::Claim;
    pack_.run(pack_.first(team, plan), team, plan, [&](Claim now, Claim) { pack(now.index); });
    const Claim first = multiply_.first(team, plan);
    pack_.wait(IdlePrefetch(tiles(piece(first))));
    // Nobody waits for the end of this phase: the pool waits until all workers have left.
    multiply_.run(first, team, plan, [&](Claim now, Claim next) {
      multiply(worker, piece(now), tiles(piece(next)).data());
    });
  }

 private:
  void plan() {
    divide_evenly(pool_.plan(), batch_.tokens, &pack_);
    divide_among_teams(pool_.plan(), matrix_.rows, 1, matrix_.tile_bytes(), &multiply_, rows_);
  }

  int64_t block() const { return std::min(token_block_, batch_.tokens); }
  int64_t sums_bytes() const { return (block() + kOutPadding) * kTileRows * int64_t{4}; }
  int64_t worker_bytes() const {
    const int64_t gathered =
        format_.gathers(block()) ? format_.gathered_bytes(matrix_.k, block()) : 0;
    return kScratchBytes + sums_bytes() + gathered;
  }

  Piece piece(Phase::Claim claim) const { return piece_of(pool_.plan(), rows_, claim); }
  // The tiles of a piece, which follow each other in memory.
  std::span<const char> tiles(const Piece& piece) const {
    if (piece.rows == 0) return {};
    return {matrix_.tile(0, 0, piece.row), static_cast<size_t>(piece.rows * matrix_.row_bytes)};
  }

  void pack(int64_t token) {
    pack_row(kernels_, format_, static_cast<const uint16_t*>(batch_.x) + token * batch_.x_stride,
             batch_.type, matrix_.k, block_log2_, ws_.acts.data() + token * act_row_);
  }

  // Multiplies a piece's tiles with all tokens. `next` is read after them.
  void multiply(int worker, const Piece& piece, const char* next) {
    char* scratch = ws_.workers.data() + worker * worker_bytes();
    auto* sums = reinterpret_cast<float*>(scratch + kScratchBytes);
    char* const gathered = scratch + kScratchBytes + sums_bytes();
    int64_t gathered_first = -1;
    const void* acts[kTokenBlock];
    const int64_t end = piece.row + piece.rows;
    for (int64_t row = piece.row; row < end; row += kTileRows) {
      MatmulArgs args = matrix_.product(0, 0, row);
      args.next = row + kTileRows < end ? matrix_.tile(0, 0, row + kTileRows) : next;
      args.acts = acts;
      args.gathered = gathered;
      args.act_block_log2 = block_log2_;
      args.out = sums;
      args.scratch = scratch;
      const Epilogue epilogue = matrix_.epilogue(0, 0, row);
      for (int64_t first = 0; first < batch_.tokens; first += token_block_) {
        args.tokens = std::min(token_block_, batch_.tokens - first);
        if (first != gathered_first) {
          for (int64_t t = 0; t < args.tokens; ++t) {
            acts[t] = ws_.acts.data() + (first + t) * act_row_;
          }
          if (format_.gathers(args.tokens)) {
            format_.gather(acts, args.tokens, matrix_.k, gathered);
          }
          gathered_first = first;
        }
        format_.matmul(args);
        for (int64_t t = 0; t < args.tokens; ++t) {
          store({sums + t * kTileRows, epilogue}, first + t, row, args.rows);
        }
      }
    }
  }

  // Writes a token's outputs of one tile, in the type of y.
  void store(const Sums& sums, int64_t token, int64_t row, int64_t rows) {
    float values[kTileRows];
    constexpr float kOne = 1.0f;
    constexpr int32_t kPresent = 0;
    kernels_.finish(sums, rows, false, values);
    kernels_.combine(values, rows, &kOne, &kPresent, 1, rows, batch_.type,
                     static_cast<uint16_t*>(batch_.y) + token * matrix_.rows + row);
  }

  const Matrix& matrix_;
  const LinearBatch& batch_;
  const Kernels& kernels_;
  const FormatKernels& format_;
  ThreadPool& pool_;
  Workspace& ws_;
  const int block_log2_;   // of the blocks in which x is quantised; it may have outliers
  const int64_t act_row_;  // bytes
  const int64_t token_block_;
  NodeRows rows_[kMaxNodes];
  Phase pack_{"pack"}, multiply_{"multiply"};
};

}  // namespace

void order_linear(const LinearSpec& layer, ThreadPool& pool) {
  order_matrix(layer.matrix, 1, pool);
}

void linear(const LinearSpec& layer, const LinearBatch& batch, const Kernels& kernels,
            ThreadPool& pool, Workspace& workspace) {
  const int64_t most = std::max<int64_t>(
      kPassBytes / kernels.of(layer.matrix.format).act_row_bytes(layer.matrix.k), 1);
  for (int64_t first = 0; first < batch.tokens; first += most) {
    LinearBatch part = batch;
    part.tokens = std::min(most, batch.tokens - first);
    part.x = static_cast<const uint16_t*>(batch.x) + first * batch.x_stride;
    part.y = static_cast<uint16_t*>(batch.y) + first * layer.matrix.rows;
    Pass(layer, part, kernels, pool, workspace).run();
  }
}

}  // namespace lk

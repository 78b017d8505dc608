#include "lk/moe.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "lk/phase.h"
#include "lk/rows.h"

namespace lk {
namespace {

// Bytes of weights in one piece of work. Small enough to balance threads (9 us of reading at
// 30 GB/s) and to stay in a core's L2 while several tokens pass over it; large enough for the
// memory to see one long stream.
constexpr int64_t kPieceBytes = 256 << 10;
constexpr int64_t kMaxPieceRows = 128;
// Tokens that pass over a piece at a time: bounds the scratch of a worker.
constexpr int64_t kTokenBlock = 48;
// Scratch for one pass; larger batches run in several passes over the weights.
constexpr int64_t kPassBytes = int64_t{256} << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Some rows of one active expert; none if rows is 0.
struct Piece {
  int64_t active = 0;  // index into the active experts
  int64_t row = 0;
  int64_t rows = 0;
};

// Rows of one node and how they are cut into pieces.
struct Rows {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t piece = 1;

  int64_t pieces() const { return ceil_div(end - begin, piece); }
  Piece cut(int64_t index) const {
    const int64_t row = begin + index % pieces() * piece;
    return {index / pieces(), row, std::min(piece, end - row)};
  }
};

// One pass over the weights for at most pass_tokens tokens.
class Pass {
 public:
  Pass(const LayerSpec& layer, const Batch& batch, const Kernels& kernels, ThreadPool& pool,
       Workspace& workspace)
      : layer_(layer),
        batch_(batch),
        kernels_(kernels),
        format_(kernels.of(layer.format)),
        pool_(pool),
        ws_(workspace),
        nodes_(static_cast<int>(pool.plan().nodes.size())),
        slots_(batch.tokens * batch.topk),
        act_row_(padded(layer.hidden) * format_.act_bytes),
        inter_row_(padded(layer.intermediate) * format_.act_bytes) {}

  void run() {
    group_by_expert();
    const int64_t act_rows = layer_.weight_on_input ? slots_ : batch_.tokens;
    ws_.acts.resize(act_rows * act_row_);
    ws_.inter.resize(slots_ * inter_row_);
    ws_.partial.resize(slots_ * layer_.hidden);
    if (layer_.weight_on_input) {
      std::fill_n(ws_.ones.resize(batch_.topk), batch_.topk, 1.0f);
    }
    plan();
    pool_.run(*this);
  }

  void operator()(int worker) {
    const int node = pool_.plan().workers[worker].node;
    using Claim = Phase::Claim;
    pack_.drain(node, nodes_, [&](Claim now, Claim) { pack(now.index); });
    gate_up_.drain(node, nodes_, [&](Claim now, Claim next) {
      const Piece after = next.index < 0 ? Piece() : gate_up_rows_[next.node].cut(next.index);
      gate_up(gate_up_rows_[now.node].cut(now.index), after);
    });
    down_.drain(node, nodes_, [&](Claim now, Claim next) {
      const Piece after = next.index < 0 ? Piece() : down_rows_[next.node].cut(next.index);
      down(down_rows_[now.node].cut(now.index), after);
    });
    combine_.drain(node, nodes_, [&](Claim now, Claim) { combine(now.index); });
  }

 private:
  // Counting sort of the slots by expert.
  void group_by_expert() {
    int32_t* begin = ws_.expert_begin.resize(layer_.experts + 1);
    int32_t* active = ws_.active.resize(layer_.experts);
    int32_t* slots = ws_.slots.resize(slots_);
    std::fill_n(begin, layer_.experts + 1, 0);
    for (int64_t slot = 0; slot < slots_; ++slot) {
      if (batch_.ids[slot] >= 0) ++begin[batch_.ids[slot]];
    }
    int32_t sum = 0;
    for (int64_t expert = 0; expert < layer_.experts; ++expert) {
      if (begin[expert] != 0) active[active_++] = static_cast<int32_t>(expert);
      sum += begin[expert];
      begin[expert] = sum;
    }
    begin[layer_.experts] = sum;
    // Backwards, so that each expert's begin ends up where its slots begin, in the tokens' order.
    for (int64_t slot = slots_; slot-- > 0;) {
      if (batch_.ids[slot] >= 0) slots[--begin[batch_.ids[slot]]] = static_cast<int32_t>(slot);
    }
  }

  // Each node's rows, cut into pieces of about kPieceBytes, and smaller ones if there would be
  // fewer than eight pieces a worker.
  void plan_rows(int64_t rows, int64_t row_bytes, Phase* phase, Rows* out) {
    const std::vector<int>& workers = pool_.plan().node_workers;
    for (int node = 0; node < nodes_; ++node) {
      Rows& mine = out[node];
      mine.begin = first_row(rows, workers, node);
      mine.end = first_row(rows, workers, node + 1);
      const int64_t fair = ceil_div((mine.end - mine.begin) * active_, 8 * workers[node]);
      mine.piece = std::min(std::clamp<int64_t>(kPieceBytes / row_bytes, 4, kMaxPieceRows),
                            std::max<int64_t>(ceil_div(fair, 4) * 4, 4));
      phase->set(node, active_ * mine.pieces());
    }
  }

  void plan() {
    // x of one token is packed by whoever comes first; more are divided.
    pack_.set(0, layer_.weight_on_input ? slots_ : batch_.tokens);
    plan_rows(layer_.intermediate, 4 * layer_.hidden, &gate_up_, gate_up_rows_);
    plan_rows(layer_.hidden, 2 * layer_.intermediate, &down_, down_rows_);
    combine_blocks_ = ceil_div(layer_.hidden, kCombineColumns);
    combine_.set(0, batch_.tokens * combine_blocks_);
  }

  const char* w13_row(int64_t expert, int64_t row) const {
    return static_cast<const char*>(layer_.w13) +
           (expert * 2 * layer_.intermediate + row) * 2 * layer_.hidden;
  }
  const char* w2_row(int64_t expert, int64_t row) const {
    return static_cast<const char*>(layer_.w2) +
           (expert * layer_.hidden + row) * 2 * layer_.intermediate;
  }

  void pack(int64_t row) {
    const int64_t token = layer_.weight_on_input ? row / batch_.topk : row;
    const float scale = layer_.weight_on_input ? batch_.weights[row] : 1.0f;
    format_.pack(static_cast<const uint16_t*>(batch_.x) + token * batch_.x_stride, batch_.type,
                 layer_.hidden, scale, ws_.acts.data() + row * act_row_);
  }

  void gate_up(const Piece& piece, const Piece& after) {
    const auto [active, row, rows] = piece;
    const int64_t expert = ws_.active[active];
    float gate[kTokenBlock * kMaxPieceRows];
    float up[kTokenBlock * kMaxPieceRows];
    const void* acts[kTokenBlock];
    float* gate_out[kTokenBlock];
    float* up_out[kTokenBlock];
    for (int64_t t = 0; t < kTokenBlock; ++t) {
      gate_out[t] = gate + t * kMaxPieceRows;
      up_out[t] = up + t * kMaxPieceRows;
    }
    const char* gate_rows = w13_row(expert, row);
    const char* up_rows = w13_row(expert, layer_.intermediate + row);
    const char* next = after.rows == 0 ? nullptr : w13_row(ws_.active[after.active], after.row);
    const int64_t end = ws_.expert_begin[expert + 1];
    for (int64_t at = ws_.expert_begin[expert]; at < end; at += kTokenBlock) {
      const int64_t tokens = std::min(kTokenBlock, end - at);
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t slot = ws_.slots[at + t];
        acts[t] = ws_.acts.data() + (layer_.weight_on_input ? slot : slot / batch_.topk) * act_row_;
      }
      format_.matmul(
          {gate_rows, up_rows, 2 * layer_.hidden, rows, layer_.hidden, acts, gate_out, tokens});
      format_.matmul({up_rows, next, 2 * layer_.hidden, rows, layer_.hidden, acts, up_out, tokens});
      for (int64_t t = 0; t < tokens; ++t) {
        char* inter = ws_.inter.data() + (at + t) * inter_row_;
        format_.activate(layer_.activation, gate_out[t], up_out[t], rows,
                         inter + row * format_.act_bytes);
        if (row + rows == layer_.intermediate) {
          std::fill(inter + layer_.intermediate * format_.act_bytes, inter + inter_row_, 0);
        }
      }
    }
  }

  void down(const Piece& piece, const Piece& after) {
    const auto [active, row, rows] = piece;
    const int64_t expert = ws_.active[active];
    const char* next = after.rows == 0 ? nullptr : w2_row(ws_.active[after.active], after.row);
    const void* acts[kTokenBlock];
    float* out[kTokenBlock];
    const int64_t end = ws_.expert_begin[expert + 1];
    for (int64_t at = ws_.expert_begin[expert]; at < end; at += kTokenBlock) {
      const int64_t tokens = std::min(kTokenBlock, end - at);
      for (int64_t t = 0; t < tokens; ++t) {
        acts[t] = ws_.inter.data() + (at + t) * inter_row_;
        out[t] = ws_.partial.data() + ws_.slots[at + t] * layer_.hidden + row;
      }
      format_.matmul({w2_row(expert, row), next, 2 * layer_.intermediate, rows, layer_.intermediate,
                      acts, out, tokens});
    }
  }

  void combine(int64_t index) {
    const int64_t token = index / combine_blocks_;
    const int64_t column = index % combine_blocks_ * kCombineColumns;
    const int64_t slot = token * batch_.topk;
    kernels_.combine(ws_.partial.data() + slot * layer_.hidden + column, layer_.hidden,
                     layer_.weight_on_input ? ws_.ones.data() : batch_.weights + slot,
                     batch_.ids + slot, static_cast<int>(batch_.topk),
                     std::min(kCombineColumns, layer_.hidden - column), batch_.type,
                     static_cast<uint16_t*>(batch_.y) + token * layer_.hidden + column);
  }

  static constexpr int64_t kCombineColumns = 1024;

  const LayerSpec& layer_;
  const Batch& batch_;
  const Kernels& kernels_;
  const FormatKernels& format_;
  ThreadPool& pool_;
  Workspace& ws_;
  const int nodes_;
  const int64_t slots_;
  const int64_t act_row_;    // bytes
  const int64_t inter_row_;  // bytes
  int64_t active_ = 0;
  int64_t combine_blocks_ = 0;
  Rows gate_up_rows_[kMaxNodes];
  Rows down_rows_[kMaxNodes];
  Phase pack_, gate_up_, down_, combine_;
};

template <class Id>
void check_ids(const LayerSpec& layer, const Batch& batch, const Id* ids) {
  for (int64_t slot = 0; slot < batch.tokens * batch.topk; ++slot) {
    const int64_t id = ids[slot];
    if (id < -1 || id >= layer.experts) {
      throw std::invalid_argument("topk_ids[" + std::to_string(slot / batch.topk) + ", " +
                                  std::to_string(slot % batch.topk) + "] is " + std::to_string(id) +
                                  ", must be -1 (skip) to " + std::to_string(layer.experts - 1));
    }
  }
}

}  // namespace

void expert_block(const LayerSpec& layer, const Batch& batch, const Kernels& kernels,
                  ThreadPool& pool, Workspace& workspace) {
  if (static_cast<int>(pool.plan().nodes.size()) > kMaxNodes) {
    throw std::invalid_argument("more than " + std::to_string(kMaxNodes) + " NUMA nodes");
  }
  const int32_t* ids = batch.ids;
  if (batch.ids64) {
    check_ids(layer, batch, batch.ids64);
    const int64_t slots = batch.tokens * batch.topk;
    ids = std::copy_n(batch.ids64, slots, workspace.ids.resize(slots)) - slots;
  } else {
    check_ids(layer, batch, ids);
  }
  const int64_t slot_bytes =
      (layer.hidden + padded(layer.intermediate)) * 4 + padded(layer.hidden) * 4;
  const int64_t most =
      std::max<int64_t>(kPassBytes / (slot_bytes * std::max<int64_t>(batch.topk, 1)), 1);
  for (int64_t first = 0; first < batch.tokens; first += most) {
    Batch part = batch;
    part.tokens = std::min(most, batch.tokens - first);
    part.x = static_cast<const uint16_t*>(batch.x) + first * batch.x_stride;
    part.ids = ids + first * batch.topk;
    part.weights = batch.weights + first * batch.topk;
    part.y = static_cast<uint16_t*>(batch.y) + first * layer.hidden;
    Pass(layer, part, kernels, pool, workspace).run();
  }
}

}  // namespace lk

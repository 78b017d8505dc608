#include "lk/moe.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <span>
#include <stdexcept>
#include <string>

#include "lk/integers.h"
#include "lk/phase.h"
#include "lk/pieces.h"
#include "lk/rows.h"
#include "lk/tiles.h"

namespace lk {
namespace {

// If the outputs of all experts have more bytes than this, they leave the caches before they are
// combined.
constexpr int64_t kCachedBytes = int64_t{16} << 20;
// Whether a number in 16 bits is neither NaN nor infinity.
bool is_finite(uint16_t value, Scalar type) {
  const int special = type == Scalar::kBf16 ? 0x7f80 : 0x7c00;
  return (value & special) != special;
}

// How x is packed for a matrix that multiplies it.
struct PackedX {
  PackedX(const Matrix& matrix, const Kernels& kernels, int64_t hidden)
      : format(kernels.of(matrix.format)),
        block_log2(widest_block_log2(matrix.group, format.most_block_log2)),
        row_bytes(format.act_row_bytes(hidden)) {}

  const FormatKernels& format;
  // The size of the blocks in which x is quantised, as large as the groups of weights allow. For
  // normally distributed values, blocks of 256 instead of 32 cost 14% more error (1.33% of the
  // result instead of 1.17%) and save seven of eight scalings of sums. The intermediate has more
  // outliers: there, blocks of 64 instead of 32 already cost as much.
  const int block_log2;
  const int64_t row_bytes;
};

// One pass over the weights, for at most pass_tokens() tokens.
class Pass {
 public:
  Pass(const LayerSpec& layer, const Batch& batch, const Kernels& kernels, ThreadPool& pool,
       Workspace& workspace)
      : layer_(layer),
        batch_(batch),
        kernels_(kernels),
        w13_x_(layer.w13, kernels, layer.hidden),
        up_x_(layer.up(), kernels, layer.hidden),
        w2_format_(kernels.of(layer.w2.format)),
        pool_(pool),
        ws_(workspace),
        inter_block_log2_(widest_block_log2(layer.w2.group, w2_format_.outlier_block_log2)),
        slots_(batch.tokens * batch.topk),
        stream_(slots_ * layer.hidden * static_cast<int64_t>(sizeof(float)) > kCachedBytes),
        inter_row_(w2_format_.act_row_bytes(layer.intermediate)),
        token_block_(std::min({token_block(w13_x_.format, layer.hidden),
                               token_block(up_x_.format, layer.hidden),
                               token_block(w2_format_, layer.intermediate)})) {}

  // Grows the workspace. No size becomes larger with fewer tokens.
  void reserve() {
    ws_.expert_begin.resize(layer_.experts + 1);
    ws_.active.resize(layer_.experts);
    ws_.slots.resize(slots_);
    ws_.acts.resize(w13_acts_bytes() + (layer_.has_w3() ? batch_.tokens * up_x_.row_bytes : 0));
    ws_.inter.resize(slots_ * inter_row_);
    ws_.partial.resize(slots_ * layer_.hidden);
    ws_.workers.resize(pool_.size() * worker_bytes());
    if (layer_.weight_on_input) ws_.ones.resize(batch_.topk);
  }

  // Computes y and appends its faults. `first` is the number of the pass's first row.
  void run(int64_t first, std::vector<Fault>* faults) {
    reserve();
    group_by_expert();
    if (layer_.weight_on_input) std::fill_n(ws_.ones.data(), batch_.topk, 1.0f);
    plan();
    pool_.run(*this);
    // Faults are looked for only now: otherwise the threads would have to share a list, which is
    // nearly always empty.
    if (!finite_.load(std::memory_order_relaxed)) find_faults(first, faults);
  }

  // What each worker does: its share of all phases.
  void operator()(int worker) {
    const PoolPlan& plan = pool_.plan();
    const int team = plan.workers[worker].team;
    using Claim = Phase::Claim;
    pack_.run(pack_.first(team, plan), team, plan, [&](Claim now, Claim) { pack(now.index); });
    const Claim gate_up_first = gate_up_.first(team, plan);
    pack_.wait(IdlePrefetch(tiles(layer_.w13, piece(gate_up_rows_, gate_up_first))));
    gate_up_.run(gate_up_first, team, plan, [&](Claim now, Claim next) {
      gate_up(worker, piece(gate_up_rows_, now), piece(gate_up_rows_, next));
    });
    const Claim down_first = down_.first(team, plan);
    gate_up_.wait(IdlePrefetch(tiles(layer_.w2, piece(down_rows_, down_first))));
    down_.run(down_first, team, plan, [&](Claim now, Claim next) {
      down(worker, piece(down_rows_, now), piece(down_rows_, next));
    });
    down_.wait();
    // Nobody waits for the end of this phase: the pool waits until all workers have left.
    Claim now = combine_.first(team, plan);
    for (; now.index >= 0; now = combine_.claim(now, team, plan)) combine(now.index);
  }

 private:
  // Sorts the slots by expert, by counting.
  void group_by_expert() {
    int32_t* begin = ws_.expert_begin.data();
    int32_t* active = ws_.active.data();
    int32_t* slots = ws_.slots.data();
    LayerCounters* counters = layer_.counters;
    std::fill_n(begin, layer_.experts + 1, 0);
    for (int64_t slot = 0; slot < slots_; ++slot) {
      if (batch_.ids[slot] >= 0) ++begin[batch_.ids[slot]];
    }
    int32_t sum = 0;
    for (int64_t expert = 0; expert < layer_.experts; ++expert) {
      if (begin[expert] != 0) {
        active[active_++] = static_cast<int32_t>(expert);
        if (counters != nullptr) counters->tokens_of_experts()[expert] += begin[expert];
      }
      sum += begin[expert];
      begin[expert] = sum;
    }
    begin[layer_.experts] = sum;
    if (counters != nullptr) counters->add_pass(active_);
    // Going backwards, each expert's `begin` ends where its slots begin, and its slots are in the
    // order of their tokens.
    for (int64_t slot = slots_; slot-- > 0;) {
      if (batch_.ids[slot] >= 0) slots[--begin[batch_.ids[slot]]] = static_cast<int32_t>(slot);
    }
  }

  void divide(int64_t rows, int64_t tile_bytes, Phase* phase, NodeRows* node_rows) {
    divide_among_teams(pool_.plan(), rows, active_, tile_bytes, phase, node_rows);
  }

  void plan() {
    divide_evenly(pool_.plan(), batch_.tokens, &pack_);
    const Matrix& w13 = layer_.w13;
    divide(w13.rows, w13.parts * w13.tile_bytes() + layer_.w3.tile_bytes(), &gate_up_,
           gate_up_rows_);
    divide(layer_.w2.rows, layer_.w2.tile_bytes(), &down_, down_rows_);
    const int64_t share = ceil_div(batch_.tokens * layer_.hidden, pool_.size());
    combine_columns_ = std::clamp(round_up(share, kLeastColumns), kLeastColumns, kMostColumns);
    combine_blocks_ = ceil_div(layer_.hidden, combine_columns_);
    divide_evenly(pool_.plan(), batch_.tokens * combine_blocks_, &combine_);
  }

  // Where the packed rows of x are for w13, and for w3.
  char* w13_acts() const { return ws_.acts.data(); }
  char* w3_acts() const { return ws_.acts.data() + w13_acts_bytes(); }
  int64_t w13_acts_bytes() const {
    constexpr int64_t kCacheLine = 64;
    return round_up(batch_.tokens * w13_x_.row_bytes, kCacheLine);
  }

  void pack(int64_t token) {
    pack(token, w13_x_, w13_acts());
    if (layer_.has_w3()) pack(token, up_x_, w3_acts());
  }
  void pack(int64_t token, const PackedX& x, char* acts) {
    pack_row(kernels_, x.format, static_cast<const uint16_t*>(batch_.x) + token * batch_.x_stride,
             batch_.type, layer_.hidden, x.block_log2, acts + token * x.row_bytes);
  }

  // A worker's scratch memory holds the kernels' own, and the sums of both parts for a block of
  // tokens.
  int64_t block() const { return std::min(token_block_, batch_.tokens * batch_.topk); }
  // How many rows have room for their sums, with so many tokens.
  int64_t run_rows(int64_t tokens) const {
    return std::max<int64_t>(block() / tokens, 1) * kTileRows;
  }
  int64_t sums_bytes() const {
    return (block() + kOutPadding) * kTileRows * static_cast<int64_t>(sizeof(float));
  }
  int64_t gathered_bytes() const {
    const auto bytes = [&](const FormatKernels& format, int64_t k) {
      return format.gathers(block()) ? format.gathered_bytes(k, block()) : 0;
    };
    return std::max({bytes(w13_x_.format, layer_.hidden), bytes(up_x_.format, layer_.hidden),
                     bytes(w2_format_, layer_.intermediate)});
  }
  int64_t worker_bytes() const {
    return 2 * sums_bytes() + kScratchBytes + (layer_.has_w3() ? 2 : 1) * gathered_bytes();
  }

  Piece piece(const NodeRows* rows, Phase::Claim claim) const {
    return piece_of(pool_.plan(), rows, claim);
  }

  // The tiles of a piece in the first part of `matrix`, which follow each other in memory.
  std::span<const char> tiles(const Matrix& matrix, const Piece& piece) const {
    if (piece.rows == 0) return {};
    return {matrix.tile(ws_.active[piece.active], 0, piece.row),
            static_cast<size_t>(piece.rows * matrix.row_bytes)};
  }

  // Computes the sums of a piece's tiles in one part of a matrix, [tile][tokens][kTileRows]. `next`
  // is read after them.
  void multiply(const FormatKernels& format, const Matrix& matrix, int64_t expert, int64_t part,
                const Piece& tiles, const char* next, int act_block_log2, const void* const* acts,
                const char* gathered, int64_t tokens, char* scratch, float* sums) {
    for (int64_t at = 0; at < tiles.rows; at += kTileRows) {
      const int64_t row = tiles.row + at;
      const bool last = at + kTileRows >= tiles.rows;
      MatmulArgs args = matrix.product(expert, part, row);
      args.next = last ? next : matrix.tile(expert, part, row + kTileRows);
      args.acts = acts;
      args.gathered = gathered;
      args.act_block_log2 = act_block_log2;
      args.tokens = tokens;
      args.out = sums + at * tokens;
      args.scratch = scratch;
      format.matmul(args);
    }
  }

  // The packed rows of some tokens' x, and their copies where the kernels want them gathered.
  struct Rows {
    const void* acts[kTokenBlock];
    char* gathered;
  };

  // Finds those of the tokens of an expert from its slot number `first` on.
  void find_rows(const PackedX& x, const char* acts, int64_t expert, int64_t first, int64_t tokens,
                 Rows* rows) const {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t slot = ws_.slots[ws_.expert_begin[expert] + first + t];
      rows->acts[t] = acts + slot / batch_.topk * x.row_bytes;
    }
    if (x.format.gathers(tokens)) {
      x.format.gather(rows->acts, tokens, layer_.hidden, rows->gathered);
    }
  }

  // Multiplies gate tiles, then up tiles, as many of each as there is room for sums: so the runs of
  // tiles that follow each other in memory are long. `next_piece` is the worker's next piece.
  void gate_up(int worker, const Piece& piece, const Piece& next_piece) {
    const Matrix& w13 = layer_.w13;
    const Matrix& of_up = layer_.up();
    const int64_t up_part = layer_.up_part();
    const bool gated = has_gate(layer_.activation.kind);
    const int64_t expert = ws_.active[piece.active];
    char* scratch = ws_.workers.data() + worker * worker_bytes();
    auto* gate = reinterpret_cast<float*>(scratch + kScratchBytes);
    float* up = gated ? gate + sums_bytes() / sizeof(float) : gate;
    Rows x, own;
    x.gathered = scratch + kScratchBytes + 2 * sums_bytes();
    own.gathered = x.gathered + gathered_bytes();
    const Rows& up_rows = layer_.has_w3() ? own : x;
    int64_t found_first = -1;
    const int64_t slots = ws_.expert_begin[expert + 1] - ws_.expert_begin[expert];
    const int64_t run = run_rows(slots);
    const int64_t end = piece.row + piece.rows;
    for (int64_t row = piece.row; row < end; row += run) {
      const Piece part{piece.active, row, std::min(run, end - row)};
      const char* const next =
          row + run < end ? w13.tile(expert, 0, row + run) : tiles(w13, next_piece).data();
      for (int64_t first = 0; first < slots; first += token_block_) {
        const int64_t tokens = std::min(token_block_, slots - first);
        if (first != found_first) {
          find_rows(w13_x_, w13_acts(), expert, first, tokens, &x);
          if (layer_.has_w3()) find_rows(up_x_, w3_acts(), expert, first, tokens, &own);
          found_first = first;
        }
        if (gated) {
          multiply(w13_x_.format, w13, expert, 0, part, of_up.tile(expert, up_part, row),
                   w13_x_.block_log2, x.acts, x.gathered, tokens, scratch, gate);
        }
        multiply(up_x_.format, of_up, expert, up_part, part, next, up_x_.block_log2, up_rows.acts,
                 up_rows.gathered, tokens, scratch, up);
        for (int64_t at = 0; at < part.rows; at += kTileRows) {
          activate(expert, row + at, std::min(kTileRows, part.rows - at), first, tokens,
                   gate + at * tokens, up + at * tokens);
        }
      }
    }
  }

  // Activates a tile's sums, [tokens][kTileRows], and packs them for w2.
  void activate(int64_t expert, int64_t row, int64_t rows, int64_t first, int64_t tokens,
                const float* gate, const float* up) {
    const Epilogue of_gate = layer_.w13.epilogue(expert, 0, row);
    const Epilogue of_up = layer_.up().epilogue(expert, layer_.up_part(), row);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t at = ws_.expert_begin[expert] + first + t;
      Sums g{gate + t * kTileRows, of_gate};
      Sums u{up + t * kTileRows, of_up};
      if (layer_.weight_on_input) {
        // The router's weight is to scale x. Scaling the sums instead does not round x once more.
        g.epilogue.scale *= batch_.weights[ws_.slots[at]];
        u.epilogue.scale *= batch_.weights[ws_.slots[at]];
      }
      float values[kTileRows];
      kernels_.activate(layer_.activation, g, u, rows, values);
      w2_format_.pack(values, rows, row, layer_.intermediate, inter_block_log2_,
                      ws_.inter.data() + at * inter_row_);
    }
  }

  // Multiplies w2's tiles into the outputs of the experts.
  void down(int worker, const Piece& piece, const Piece& next_piece) {
    const Matrix& w2 = layer_.w2;
    const int64_t expert = ws_.active[piece.active];
    char* scratch = ws_.workers.data() + worker * worker_bytes();
    auto* sums = reinterpret_cast<float*>(scratch + kScratchBytes);
    char* const gathered = scratch + kScratchBytes + 2 * sums_bytes();
    int64_t gathered_first = -1;
    const void* acts[kTokenBlock];
    const int64_t end = ws_.expert_begin[expert + 1];
    const int64_t run = run_rows(end - ws_.expert_begin[expert]);
    const int64_t row_end = piece.row + piece.rows;
    for (int64_t row = piece.row; row < row_end; row += run) {
      const Piece part{piece.active, row, std::min(run, row_end - row)};
      const char* const next =
          row + run < row_end ? w2.tile(expert, 0, row + run) : tiles(w2, next_piece).data();
      // Each block of tokens is multiplied with the same tiles, which are in L2 after the first.
      for (int64_t first = ws_.expert_begin[expert]; first < end; first += token_block_) {
        const int64_t tokens = std::min(token_block_, end - first);
        if (first != gathered_first) {
          for (int64_t t = 0; t < tokens; ++t) {
            acts[t] = ws_.inter.data() + (first + t) * inter_row_;
          }
          if (w2_format_.gathers(tokens)) {
            w2_format_.gather(acts, tokens, layer_.intermediate, gathered);
          }
          gathered_first = first;
        }
        multiply(w2_format_, w2, expert, 0, part, next, inter_block_log2_, acts, gathered, tokens,
                 scratch, sums);
        for (int64_t at = 0; at < part.rows; at += kTileRows) {
          const Epilogue epilogue = w2.epilogue(expert, 0, row + at);
          const int64_t rows = std::min(kTileRows, part.rows - at);
          for (int64_t t = 0; t < tokens; ++t) {
            kernels_.finish({sums + at * tokens + t * kTileRows, epilogue}, rows, stream_,
                            ws_.partial.data() + ws_.slots[first + t] * layer_.hidden + row + at);
          }
        }
      }
    }
    if (stream_) kernels_.end_stream();
  }

  // Adds up the outputs of a token's experts, in a block of columns.
  void combine(int64_t index) {
    const int64_t token = index / combine_blocks_;
    const int64_t column = index % combine_blocks_ * combine_columns_;
    const int64_t slot = token * batch_.topk;
    const bool finite = kernels_.combine(
        ws_.partial.data() + slot * layer_.hidden + column, layer_.hidden,
        layer_.weight_on_input ? ws_.ones.data() : batch_.weights + slot, batch_.ids + slot,
        static_cast<int>(batch_.topk), std::min(combine_columns_, layer_.hidden - column),
        batch_.type, static_cast<uint16_t*>(batch_.y) + token * layer_.hidden + column);
    if (!finite) finite_.store(false, std::memory_order_relaxed);
  }

  // Appends the faults of all rows of y.
  void find_faults(int64_t first, std::vector<Fault>* faults) const {
    const auto finite = [&](const void* row) {
      const auto* values = static_cast<const uint16_t*>(row);
      return std::all_of(values, values + layer_.hidden,
                         [&](uint16_t value) { return is_finite(value, batch_.type); });
    };
    for (int64_t token = 0; token < batch_.tokens; ++token) {
      if (finite(static_cast<const uint16_t*>(batch_.y) + token * layer_.hidden)) continue;
      const void* x = static_cast<const uint16_t*>(batch_.x) + token * batch_.x_stride;
      faults->push_back(finite(x) ? fault_of(token) : Fault{});
      faults->back().row = first + token;
    }
  }

  // Why the output of a token is not finite, though its input is.
  Fault fault_of(int64_t token) const {
    const int64_t begin = token * batch_.topk;
    const int64_t end = begin + batch_.topk;
    for (int64_t slot = begin; slot < end; ++slot) {
      if (batch_.ids[slot] >= 0 && !std::isfinite(batch_.weights[slot])) {
        return {token, FaultSource::kRouter, batch_.ids[slot]};
      }
    }
    for (int64_t slot = begin; slot < end; ++slot) {
      const float* out = ws_.partial.data() + slot * layer_.hidden;
      if (batch_.ids[slot] >= 0 && !std::all_of(out, out + layer_.hidden,
                                                [](float value) { return std::isfinite(value); })) {
        return {token, FaultSource::kExpert, batch_.ids[slot]};
      }
    }
    return {token, FaultSource::kSum, -1};
  }

  // Columns of y in a piece. 64 are two cache lines of y.
  static constexpr int64_t kLeastColumns = 64;
  static constexpr int64_t kMostColumns = 1024;

  const LayerSpec& layer_;
  const Batch& batch_;
  const Kernels& kernels_;
  const PackedX w13_x_;
  const PackedX up_x_;  // that of w3, or else that of w13
  const FormatKernels& w2_format_;
  ThreadPool& pool_;
  Workspace& ws_;
  const int inter_block_log2_;  // that of the intermediate; see PackedX::block_log2
  const int64_t slots_;
  const bool stream_;        // whether `partial` is written past the caches
  const int64_t inter_row_;  // bytes
  const int64_t token_block_;
  int64_t active_ = 0;
  int64_t combine_columns_ = 0;
  int64_t combine_blocks_ = 0;
  Atomic<bool> finite_{true};  // whether all of y is
  NodeRows gate_up_rows_[kMaxNodes];
  NodeRows down_rows_[kMaxNodes];
  Phase pack_{"pack"}, gate_up_{"gate_up"}, down_{"down"}, combine_{"combine"};
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

// How many tokens one pass computes at most.
int64_t pass_tokens(const LayerSpec& layer, const Kernels& kernels, int64_t topk) {
  const int64_t slot_bytes =
      layer.hidden * 4 + kernels.of(layer.w2.format).act_row_bytes(layer.intermediate) +
      PackedX(layer.w13, kernels, layer.hidden).row_bytes +
      (layer.has_w3() ? PackedX(layer.w3, kernels, layer.hidden).row_bytes : 0);
  return std::max<int64_t>(kPassBytes / (slot_bytes * std::max<int64_t>(topk, 1)), 1);
}

}  // namespace

std::vector<Fault> expert_block(const LayerSpec& layer, const Batch& batch, const Kernels& kernels,
                                ThreadPool& pool, Workspace& workspace) {
  const int32_t* ids = batch.ids;
  if (batch.ids64) {
    check_ids(layer, batch, batch.ids64);
    const int64_t slots = batch.tokens * batch.topk;
    ids = std::copy_n(batch.ids64, slots, workspace.ids.resize(slots)) - slots;
  } else {
    check_ids(layer, batch, ids);
  }
  const int64_t most = pass_tokens(layer, kernels, batch.topk);
  std::vector<Fault> faults;
  for (int64_t first = 0; first < batch.tokens; first += most) {
    Batch part = batch;
    part.tokens = std::min(most, batch.tokens - first);
    part.x = static_cast<const uint16_t*>(batch.x) + first * batch.x_stride;
    part.ids = ids + first * batch.topk;
    part.weights = batch.weights + first * batch.topk;
    part.y = static_cast<uint16_t*>(batch.y) + first * layer.hidden;
    Pass(layer, part, kernels, pool, workspace).run(first, &faults);
  }
  return faults;
}

void reserve_workspace(const LayerSpec& layer, int64_t tokens, int64_t topk, const Kernels& kernels,
                       ThreadPool& pool, Workspace& workspace) {
  Batch batch;
  batch.tokens = std::min(tokens, pass_tokens(layer, kernels, topk));
  batch.topk = topk;
  Pass(layer, batch, kernels, pool, workspace).reserve();
}

}  // namespace lk

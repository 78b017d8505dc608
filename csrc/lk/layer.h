// One layer's experts: where their weights, scales and biases are, and the order that they are in.
#pragma once

#include <cstdint>

#include "lk/integers.h"
#include "lk/kernels.h"
#include "lk/thread_pool.h"

namespace lk {

// w13 (gate rows, then up rows: two parts; up rows alone: one) or w2 (one part) of all experts.
struct Matrix {
  char* weights = nullptr;  // [experts][parts][rows] rows of row_bytes, in tiles by part
  int64_t parts = 1;
  int64_t rows = 0;  // of one part
  int64_t k = 0;
  int64_t row_bytes = 0;
  bool interleaved = false;  // the two parts' rows came as gate 0, up 0, gate 1, up 1 and so on

  // Scales of groups along K, [experts][parts][rows][k / group] in tiles by part, one scale being
  // the unit; or float [experts][parts * rows / 128][k / 128] as they come (kFloatBlocks).
  ScaleType scale_type = ScaleType::kNone;
  char* scale = nullptr;
  int64_t group = 0;
  uint8_t* zero = nullptr;  // as group scales

  float* row_scale = nullptr;         // [experts][parts * rows]
  const float* part_scale = nullptr;  // [experts][parts], or [experts] if shared_part_scale
  bool shared_part_scale = false;
  float* bias = nullptr;  // [experts][parts * rows]

  int64_t groups() const { return group == 0 ? 0 : ceil_div(k, group); }
  int64_t scale_bytes() const;
  int64_t tile_bytes() const { return kTileRows * row_bytes; }

  // The tile whose first row is `row` of a part.
  const char* tile(int64_t expert, int64_t part, int64_t row) const;
  // The arguments of its product that depend on the weights alone.
  MatmulArgs product(int64_t expert, int64_t part, int64_t row) const;
  // What is left to do to sums of rows from `row` on.
  Epilogue epilogue(int64_t expert, int64_t part, int64_t row) const;
};

struct LayerSpec {
  Format format = Format::kBf16;
  ActivationSpec activation;
  bool weight_on_input = false;  // the router's weight scales x instead of the expert's output
  int64_t experts = 0;
  int64_t hidden = 0;
  int64_t intermediate = 0;
  Matrix w13;
  Matrix w2;
};

// Puts a layer that came row-major into the order that the kernels read, in place, and back.
void order_layer(const LayerSpec& layer, ThreadPool& pool);
void restore_layer(const LayerSpec& layer, ThreadPool& pool);

}  // namespace lk

// The experts of one layer: where their weights, scales and biases are, and in which order.
#pragma once

#include <cstdint>

#include "lk/counters.h"
#include "lk/integers.h"
#include "lk/kernels.h"
#include "lk/thread_pool.h"

namespace lk {

constexpr int64_t kScaleBlock = 128;  // rows and columns that share a scale of kFloatBlocks

// w13, w3 or w2 of all experts. w13 has two parts, gate rows and then up rows, or one part: up rows
// if the activation has no gate, and gate rows if w3 has the up rows. w3 and w2 have one part.
struct Matrix {
  Format format = Format::kBf16;
  char* weights = nullptr;  // [experts][parts][rows] rows of row_bytes; each part is cut into tiles
  int64_t parts = 1;
  int64_t rows = 0;  // in one part
  int64_t k = 0;
  int64_t row_bytes = 0;
  bool interleaved = false;  // the rows of both parts came as gate 0, up 0, gate 1, up 1 and so on

  // Scales of groups along K, [experts][parts][rows][k / group] in tiles like the weights', whose
  // unit is one scale. With kFloatBlocks, [experts][parts * rows / 128][k / 128] in the
  // checkpoint's order. With kInBlocks, they are in the rows of weights.
  ScaleType scale_type = ScaleType::kNone;
  char* scale = nullptr;
  int64_t group = 0;
  uint8_t* zero = nullptr;  // zero points, laid out like the group scales

  float* row_scale = nullptr;   // [experts][parts * rows]
  float* part_scale = nullptr;  // [experts][parts], or [experts] if shared_part_scale
  bool shared_part_scale = false;
  float* bias = nullptr;  // [experts][parts * rows]

  int64_t groups() const { return group == 0 ? 0 : ceil_div(k, group); }
  int64_t scale_bytes() const;
  int64_t tile_bytes() const { return kTileRows * row_bytes; }

  // The tile whose first row is `row` of a part.
  const char* tile(int64_t expert, int64_t part, int64_t row) const;
  // The arguments for multiplying that tile, as far as they depend on the weights.
  MatmulArgs product(int64_t expert, int64_t part, int64_t row) const;
  // What remains to be done with the sums of the rows from `row` on.
  Epilogue epilogue(int64_t expert, int64_t part, int64_t row) const;
};

struct LayerSpec {
  ActivationSpec activation;
  bool weight_on_input = false;  // the router's weight scales x instead of the expert's output
  int64_t experts = 0;
  int64_t hidden = 0;
  int64_t intermediate = 0;
  Matrix w13;
  Matrix w3;  // the up rows, if they are stored in another format than the gate rows; else empty
  Matrix w2;
  LayerCounters* counters = nullptr;  // null: nobody counts the calls

  bool has_w3() const { return w3.weights != nullptr; }
  // The matrix with the up rows, and which of its parts they are.
  const Matrix& up() const { return has_w3() ? w3 : w13; }
  int64_t up_part() const { return up().parts - 1; }
};

// Puts the row-major matrices of so many experts into the order that the kernels read, in place.
// The scales of NaN weights become NaN (nan_weights.h), and stay so if a layer is put back.
void order_matrix(const Matrix& matrix, int64_t experts, ThreadPool& pool);

// Puts a row-major layer into the order that the kernels read, in place.
void order_layer(const LayerSpec& layer, ThreadPool& pool);
// Puts it back.
void restore_layer(const LayerSpec& layer, ThreadPool& pool);

}  // namespace lk

// Random layers of experts for the tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <ostream>
#include <random>
#include <vector>

#include "lk/layer.h"
#include "lk/moe.h"
#include "lk/testing/reference_values.h"

namespace lk::test_values {

// What a matrix has beside its weights. Only the format decides whether it has zero points.
struct Extras {
  ScaleType scale_type = ScaleType::kNone;
  int64_t group = 0;
  bool row_scale = false;
  bool part_scale = false;
  bool shared_part_scale = false;
  bool bias = false;
};

inline std::vector<float> random_float_scales(int64_t count, Random& random) {
  std::uniform_real_distribution<float> uniform(0.5f, 2.0f);
  std::vector<float> scales(count);
  for (float& scale : scales) scale = uniform(random);
  return scales;
}

struct MatrixData {
  std::vector<char> weights, scale;
  std::vector<uint8_t> zero;
  std::vector<float> row_scale, part_scale, bias;

  bool operator==(const MatrixData&) const = default;
};

// A random matrix of all experts as a checkpoint has it: row-major, maybe interleaved.
class TestMatrix {
 public:
  TestMatrix(Format format, int64_t experts, int64_t parts, int64_t rows, int64_t k,
             bool interleaved, const Extras& extras, Random& random)
      : format_(format), extras_(extras) {
    Matrix& m = spec_;
    m.parts = parts;
    m.rows = rows;
    m.k = k;
    m.format = format;
    m.row_bytes = row_bytes(format, k);
    m.interleaved = interleaved;
    m.scale_type = extras.scale_type;
    m.group = extras.group;
    m.shared_part_scale = extras.shared_part_scale;
    const int64_t all = experts * parts * rows;
    data.weights = random_weights(format, all, k, random);
    const bool blocks = extras.scale_type == ScaleType::kFloatBlocks;
    data.scale = random_scales(extras.scale_type,
                               (blocks ? experts * block_rows() : all) * m.groups(), random);
    if (has_zero_points(format)) {
      for (int64_t i = 0; i < all * m.groups(); ++i) {
        data.zero.push_back(static_cast<uint8_t>(random_below(random, 16)));
      }
    }
    if (extras.row_scale) data.row_scale = random_float_scales(all, random);
    if (extras.part_scale) {
      data.part_scale =
          random_float_scales(experts * (extras.shared_part_scale ? 1 : parts), random);
    }
    if (extras.bias) data.bias = random_floats(all, random);
    for (int64_t i = 0; i < all; ++i) {
      const int64_t part = i / rows % parts;
      for (int64_t at = 0; at < k; ++at) {
        values.push_back(value_as_it_came(i / (parts * rows), part, i % rows, at));
      }
    }
    double squares = 0;
    for (double value : values) squares += value * value;
    size = std::sqrt(squares / static_cast<double>(all));
  }
  TestMatrix(const TestMatrix&) = delete;
  TestMatrix& operator=(const TestMatrix&) = delete;

  // The matrix, which points to the arrays in `data`.
  Matrix spec() {
    Matrix m = spec_;
    m.weights = data.weights.data();
    if (!data.scale.empty()) m.scale = data.scale.data();
    if (!data.zero.empty()) m.zero = data.zero.data();
    if (extras_.row_scale) m.row_scale = data.row_scale.data();
    if (extras_.part_scale) m.part_scale = data.part_scale.data();
    if (extras_.bias) m.bias = data.bias.data();
    return m;
  }

  // The place that a row of a part had in its expert when it came.
  int64_t row_as_it_came(int64_t part, int64_t row) const {
    return spec_.interleaved ? 2 * row + part : part * spec_.rows + row;
  }

  MatrixData data;
  std::vector<double> values;  // [experts][parts][rows][k], scaled
  double size = 0;             // of a row times a vector of normal numbers

 private:
  int64_t block_rows() const { return (spec_.parts * spec_.rows + 127) / 128; }

  double value_as_it_came(int64_t expert, int64_t part, int64_t row, int64_t at) const {
    const Matrix& m = spec_;
    const int64_t came = row_as_it_came(part, row);
    const int64_t index = expert * m.parts * m.rows + came;
    const int64_t group = m.group == 0 ? 0 : at / m.group;
    if (block_layout(format_) != nullptr) {
      return block_value(format_, data.weights.data() + index * m.row_bytes, at);
    }
    double value =
        code_value(format_, get_code(format_, data.weights.data() + index * m.row_bytes, at));
    const int64_t scale = index * m.groups() + group;
    if (!data.zero.empty()) value -= data.zero[scale] - 8;
    if (m.scale_type == ScaleType::kFloatBlocks) {
      value *= element<float>(data.scale.data(),
                              (expert * block_rows() + came / 128) * m.groups() + group);
    } else if (m.scale_type != ScaleType::kNone) {
      value *= scale_value(m.scale_type, data.scale.data(), scale);
    }
    if (extras_.row_scale) value *= data.row_scale[index];
    if (extras_.part_scale) {
      value *= data.part_scale[extras_.shared_part_scale ? expert : expert * m.parts + part];
    }
    return value;
  }

  const Format format_;
  const Extras extras_;
  Matrix spec_;
};

// A kind of layer; its size is chosen elsewhere.
struct Kind {
  const char* name = "";
  Format format = Format::kBf16;
  ActivationSpec activation{};
  bool interleaved = false;
  bool weight_on_input = false;
  Extras w13{}, w2{};
  Scalar type = Scalar::kBf16;        // of x and y
  std::optional<Format> w2_format{};  // if it is another one
  std::optional<Format> w3_format{};  // if the up rows have a matrix of their own
  Extras w3{};
};

inline std::ostream& operator<<(std::ostream& out, const Kind& kind) { return out << kind.name; }

struct TestLayer {
  TestLayer(const Kind& kind, int64_t experts, int64_t hidden, int64_t intermediate, Random& random)
      : w13(kind.format, experts, has_gate(kind.activation.kind) && !kind.w3_format ? 2 : 1,
            intermediate, hidden, kind.interleaved, kind.w13, random),
        w2(kind.w2_format.value_or(kind.format), experts, 1, hidden, intermediate, false, kind.w2,
           random) {
    // The biases of w2 are as large as the sums that they are added to, like those of w13 (see
    // TestBatch).
    for (float& bias : w2.data.bias) bias *= static_cast<float>(w2.size);
    spec.activation = kind.activation;
    spec.weight_on_input = kind.weight_on_input;
    spec.experts = experts;
    spec.hidden = hidden;
    spec.intermediate = intermediate;
    spec.w13 = w13.spec();
    spec.w2 = w2.spec();
    if (kind.w3_format) {
      w3.emplace(*kind.w3_format, experts, 1, intermediate, hidden, false, kind.w3, random);
      spec.w3 = w3->spec();
    }
  }

  TestMatrix w13, w2;
  std::optional<TestMatrix> w3;
  LayerSpec spec;
};

constexpr Extras kWithBias{.bias = true};
constexpr Extras kRowScales{.row_scale = true};
constexpr Extras kRowScalesAndBias{.row_scale = true, .bias = true};
constexpr Extras kOneScale{.part_scale = true, .shared_part_scale = true};
constexpr Extras kBlockScales{.scale_type = ScaleType::kFloatBlocks, .group = 128};
constexpr Extras kMxScales{.scale_type = ScaleType::kE8m0, .group = 32, .bias = true};
constexpr Extras kNvScales{.scale_type = ScaleType::kE4m3, .group = 16, .part_scale = true};
constexpr ActivationSpec kGptOss{Activation::kSwigluOai, 1.702f, 1.5f};

constexpr Extras groups_of(int64_t group, ScaleType type, bool bias = false) {
  return {.scale_type = type, .group = group, .bias = bias};
}

// Every format with its kinds of scales, every activation, with and without interleaving, and a
// matrix of its own for the up rows.
inline const Kind kKinds[] = {
    {.name = "bf16"},
    {.name = "bf16_biases", .w13 = kWithBias, .w2 = kWithBias},
    {.name = "bf16_gpt_oss",
     .activation = kGptOss,
     .interleaved = true,
     .w13 = kWithBias,
     .w2 = kWithBias},
    {.name = "bf16_no_gate", .activation = {Activation::kRelu2}, .w13 = kWithBias, .w2 = kWithBias},
    {.name = "bf16_weight_on_input", .weight_on_input = true, .w13 = kWithBias, .w2 = kWithBias},
    {.name = "fp16",
     .format = Format::kFp16,
     .activation = {Activation::kGelu},
     .type = Scalar::kFp16},
    {.name = "fp8_one_scale", .format = Format::kFp8, .w13 = kOneScale, .w2 = kOneScale},
    {.name = "fp8_row_scales",
     .format = Format::kFp8,
     .activation = {Activation::kGeluTanh},
     .w13 = kRowScales,
     .w2 = kRowScales},
    {.name = "fp8_blocks", .format = Format::kFp8, .w13 = kBlockScales, .w2 = kBlockScales},
    {.name = "fp8_blocks_interleaved",
     .format = Format::kFp8,
     .activation = kGptOss,
     .interleaved = true,
     .w13 = kBlockScales,
     .w2 = kBlockScales},
    {.name = "int8_gpt_oss",
     .format = Format::kInt8,
     .activation = kGptOss,
     .interleaved = true,
     .w13 = kRowScalesAndBias,
     .w2 = kRowScalesAndBias},
    {.name = "int8_act8", .format = Format::kInt8Act8, .w13 = kRowScales, .w2 = kRowScales},
    {.name = "int8_groups",
     .format = Format::kInt8Groups,
     .w13 = groups_of(128, ScaleType::kBf16),
     .w2 = groups_of(32, ScaleType::kFloat, true)},
    {.name = "int8_groups_act8",
     .format = Format::kInt8GroupsAct8,
     .w13 = groups_of(32, ScaleType::kFp16),
     .w2 = groups_of(64, ScaleType::kFp16)},
    {.name = "int8_act8_weight_on_input",
     .format = Format::kInt8Act8,
     .activation = {Activation::kRelu2},
     .weight_on_input = true,
     .w13 = kRowScales,
     .w2 = kRowScalesAndBias},
    {.name = "int4",
     .format = Format::kInt4,
     .w13 = groups_of(32, ScaleType::kBf16),
     .w2 = groups_of(64, ScaleType::kBf16)},
    {.name = "int4_act8",
     .format = Format::kInt4Act8,
     .w13 = groups_of(128, ScaleType::kFloat),
     .w2 = groups_of(128, ScaleType::kFloat)},
    {.name = "int4_zero_gpt_oss",
     .format = Format::kInt4Zero,
     .activation = kGptOss,
     .interleaved = true,
     .w13 = groups_of(32, ScaleType::kFp16, true),
     .w2 = groups_of(32, ScaleType::kFp16, true)},
    {.name = "int4_zero_act8",
     .format = Format::kInt4ZeroAct8,
     .w13 = groups_of(64, ScaleType::kFp16),
     .w2 = groups_of(64, ScaleType::kFp16)},
    {.name = "mxfp4_gpt_oss",
     .format = Format::kFp4,
     .activation = kGptOss,
     .interleaved = true,
     .w13 = kMxScales,
     .w2 = kMxScales},
    {.name = "mxfp4_act8", .format = Format::kFp4Act8, .w13 = kMxScales, .w2 = kMxScales},
    {.name = "nvfp4", .format = Format::kFp4, .w13 = kNvScales, .w2 = kNvScales},
    {.name = "nvfp4_act8", .format = Format::kFp4Act8, .w13 = kNvScales, .w2 = kNvScales},
    {.name = "gate_int4_act8_and_up_bf16",
     .format = Format::kInt4Act8,
     .w13 = groups_of(64, ScaleType::kFp16, true),
     .w2 = groups_of(64, ScaleType::kFp16),
     .w3_format = Format::kBf16,
     .w3 = kWithBias},
};

// A batch of random tokens for a layer; some of its slots are skipped.
struct TestBatch {
  // x is scaled so that the sums of w13 have a standard deviation of 1, where activations are not
  // linear.
  TestBatch(const Kind& kind, const TestLayer& layer, int64_t tokens, int64_t topk, Random& random)
      : x(tokens * layer.spec.hidden),
        y(x.size(), 0xffff),
        weights(random_float_scales(tokens * topk, random)) {
    const auto size = static_cast<float>(layer.w13.size);
    for (uint16_t& value : x) {
      const float normal = random_normal(random) / size;
      value = kind.type == Scalar::kBf16 ? float_to_bf16(normal) : float_to_fp16(normal);
    }
    for (int64_t slot = 0; slot < tokens * topk; ++slot) {
      const auto ids_and_skip = static_cast<uint32_t>(layer.spec.experts + 1);
      ids.push_back(static_cast<int32_t>(random_below(random, ids_and_skip)) - 1);
    }
    batch.type = kind.type;
    batch.tokens = tokens;
    batch.topk = topk;
    batch.x = x.data();
    batch.x_stride = layer.spec.hidden;
    batch.ids = ids.data();
    batch.weights = weights.data();
    batch.y = y.data();
  }
  TestBatch(const TestBatch&) = delete;
  TestBatch& operator=(const TestBatch&) = delete;

  std::vector<uint16_t> x, y;
  std::vector<int32_t> ids;
  std::vector<float> weights;
  Batch batch;
};

}  // namespace lk::test_values

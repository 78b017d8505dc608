// The arithmetic of the expert block: one table of functions for each instruction set.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lk/tiles.h"

namespace lk {

// How the weights of a matrix are stored. Act8 formats also quantise activations to 8 bits.
enum class Format {
  kBf16,
  kFp16,
  kFp8,   // e4m3fn
  kInt8,  // two's complement; each row has one scale
  kInt8Act8,
  kInt8Groups,  // the same with group scales
  kInt8GroupsAct8,
  kInt4,  // value + 8; a byte holds two weights, the one with even K in its low nibble
  kInt4Act8,
  kInt4Zero,  // value + the group's zero point
  kInt4ZeroAct8,
  kFp4,  // e2m1
  kFp4Act8,
  kQ2K,  // blocks of GGUF (blocks.h)
  kQ2KAct8,
  kQ3K,
  kQ3KAct8,
  kQ4K,
  kQ4KAct8,
  kQ5K,
  kQ5KAct8,
  kQ6K,
  kQ6KAct8,
  kQ41,
  kQ41Act8,
  kQ50,
  kQ50Act8,
  kQ51,
  kQ51Act8,
  kIq4Nl,
  kIq4NlAct8,
  kIq4Xs,
  kIq4XsAct8,
  kIq1S,
  kIq1SAct8,
  kIq1M,
  kIq1MAct8,
  kIq2Xxs,
  kIq2XxsAct8,
  kIq2Xs,
  kIq2XsAct8,
  kIq2S,
  kIq2SAct8,
  kIq3Xxs,
  kIq3XxsAct8,
  kIq3S,
  kIq3SAct8,
};
constexpr int kFormats = static_cast<int>(Format::kIq3SAct8) + 1;

// How many weights along K the four bytes of a unit hold, in formats without blocks.
constexpr int unit_weights(Format format) {
  return format <= Format::kFp16 ? 2 : format <= Format::kInt8GroupsAct8 ? 4 : 8;
}

// The type of group scales. kFloatBlocks: float32, one scale for each block of 128 x 128 weights.
// kInBlocks: the format's own, in the same tile as the weights (blocks.h).
enum class ScaleType { kNone, kBf16, kFp16, kFloat, kE8m0, kE4m3, kFloatBlocks, kInBlocks };

enum class Activation { kSilu, kGelu, kGeluTanh, kSwigluOai, kSwigluStep, kRelu2 };
struct ActivationSpec {
  Activation kind = Activation::kSilu;
  float alpha = 1.702f;  // for kSwigluOai
  float limit = 7.0f;    // for kSwigluOai and kSwigluStep
  float beta = 1.0f;     // for kSwigluOai
};
constexpr bool has_gate(Activation activation) { return activation != Activation::kRelu2; }

enum class Scalar { kBf16, kFp16 };  // element type of x and of the output

// Activations are packed in blocks of 32, padded with zeros. Where they are quantised, blocks of
// 16, 32, 64, 128 or 256 activations share a scale.
constexpr int kLeastActBlockLog2 = 4;
constexpr int kActBlockLog2 = 5;
constexpr int kMostActBlockLog2 = 8;
constexpr int64_t kActBlock = int64_t{1} << kActBlockLog2;

// Dot products of the rows of one tile with some rows of activations:
// out[t * kTileRows + r] = sum over k of weights[r][k] * scale[r][k / group] * acts[t][k]. The
// order of the sum depends only on k, so a token's result does not depend on the other tokens.
struct MatmulArgs {
  const char* tile = nullptr;  // see tiles.h
  const char* next = nullptr;  // the tile that is read next and is prefetched; may be null
  int64_t rows = 0;            // in the tile
  int64_t k = 0;
  int64_t row_bytes = 0;
  // Group scales: element [k / group][row] of the tile. With kFloatBlocks, element [k / group] of
  // `scale` for rows before block_end, and of `next_block_scale` for the rows from there on.
  ScaleType scale_type = ScaleType::kNone;
  const void* scale = nullptr;
  const float* next_block_scale = nullptr;
  int64_t block_end = kTileRows;
  int64_t group = 0;                   // 0: no group scales
  const uint8_t* zero = nullptr;       // laid out like scale; only for formats with zero points
  const char* halves = nullptr;        // with kInBlocks: what `scale` lacks (blocks.h)
  const void* const* acts = nullptr;   // a packed row for each token
  const char* gathered = nullptr;      // their copies, if FormatKernels::gathers(tokens)
  int act_block_log2 = kActBlockLog2;  // as in pack()
  int64_t tokens = 0;
  float* out = nullptr;     // [tokens][kTileRows], with room for kOutPadding tokens more
  char* scratch = nullptr;  // kScratchBytes, aligned to a cache line
};

constexpr int64_t kOutPadding = 31;

// The scratch memory of a matmul holds one block of unpacked weights, and its scales and zero
// points as floats, of 16 groups.
constexpr int64_t kUnpackedBytes = 64 * kTileRows * 4;
constexpr int64_t kScratchBytes = kUnpackedBytes + 2 * 16 * kTileRows * 4;

struct FormatKernels {
  // The instruction set in whose table this is. The functions may be those of an older one, if
  // newer instructions change nothing for the format.
  const char* isa;
  // What the weights are multiplied as: "float", "bf16", "int16" or "int8", or with AMX "bf16
  // tiles" or "int8 tiles".
  const char* arithmetic;
  // Multiplies and adds in registers, which is what limits large batches. Returns how many weights
  // it multiplied; choice.h times it.
  int64_t (*multiply_in_registers)();
  // The largest blocks of activations that may share a scale, and those that may where activations
  // have outliers, as a logarithm.
  int most_block_log2;
  int outlier_block_log2;
  // Bytes of a packed row of k activations.
  int64_t (*act_row_bytes)(int64_t k);
  // Packs activations [at, at + n) of a row of k. `at` is a multiple of 2^block_log2, and so is n
  // unless the row ends there. Arithmetics on integers quantise activations in blocks of that size.
  void (*pack)(const float* values, int64_t n, int64_t at, int64_t k, int block_log2, void* row);
  void (*matmul)(const MatmulArgs& args);
  // From so many tokens on, matmul reads their activations from MatmulArgs::gathered. 0: never.
  int64_t gather_from = 0;
  // Copies the packed rows of tokens into the order in which matmul reads them, and how many bytes
  // that takes.
  void (*gather)(const void* const* rows, int64_t tokens, int64_t k, void* out) = nullptr;
  int64_t (*gathered_bytes)(int64_t k, int64_t tokens) = nullptr;

  bool gathers(int64_t tokens) const { return gather_from != 0 && tokens >= gather_from; }
};

// What remains to be done with a row of sums: value[i] * row_scale[i] * scale + bias[i].
struct Epilogue {
  const float* row_scale = nullptr;  // may be null
  float scale = 1.0f;
  const float* bias = nullptr;  // may be null
};
struct Sums {
  const float* values = nullptr;
  Epilogue epilogue;
};

struct Kernels {
  const char* isa;
  FormatKernels formats[kFormats];
  // values[i] = float(x[i]).
  void (*widen)(const void* x, Scalar type, int64_t n, float* values);
  // out[i] = sums[i] with its epilogue. `stream` stores past the caches where the alignment of
  // `out` allows it; end_stream must follow before other threads read `out`.
  void (*finish)(const Sums& sums, int64_t n, bool stream, float* out);
  void (*end_stream)();
  // out[i] = activation(gate[i]) * up[i], both with their epilogues. gate is not read if the
  // activation has no gate.
  void (*activate)(const ActivationSpec& spec, const Sums& gate, const Sums& up, int64_t n,
                   float* out);
  // out[h] = sum over j of weights[j] * rows[j * stride + h], in the order of j and without the j
  // whose ids[j] is negative. Returns whether `out` has no NaN and no infinity.
  bool (*combine)(const float* rows, int64_t stride, const float* weights, const int32_t* ids,
                  int topk, int64_t n, Scalar type, void* out);

  const FormatKernels& of(Format format) const { return formats[static_cast<int>(format)]; }
};

const Kernels& portable_kernels() noexcept;
const Kernels& avx2_kernels() noexcept;
const Kernels& avx2_vnni_kernels() noexcept;
const Kernels& avx512_kernels() noexcept;
const Kernels& avx512_vnni_kernels() noexcept;
const Kernels& avx512_vbmi_kernels() noexcept;
const Kernels& avx512_bf16_kernels() noexcept;
const Kernels& amx_kernels() noexcept;

// The names of the kernels that this CPU can run, the one with the newest instructions last.
std::vector<std::string> available_kernels();

// The kernels of that name. Throws std::invalid_argument if there are none of that name, or if this
// CPU cannot run them.
const Kernels& kernels_named(const std::string& isa);

}  // namespace lk

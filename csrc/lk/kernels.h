// The arithmetic of the expert block, one table of functions an instruction set.
#pragma once

#include <cstdint>
#include <string>

namespace lk {

enum class Format { kBf16, kFp16 };
enum class Activation { kSilu, kGelu, kGeluTanh };
enum class Scalar { kBf16, kFp16 };  // element type of x and of the output

// Dot products of consecutive weight rows with some rows of activations:
// out[t][r] = sum over k of weights[r][k] * acts[t][k], summed in an order that depends on k alone.
// So a token's result does not depend on the tokens beside it, nor on how rows are divided.
struct MatmulArgs {
  const void* weights;  // first row; rows are contiguous, row_bytes apart
  const void* next;     // what this thread reads next, to be prefetched; may be null
  int64_t row_bytes;
  int64_t rows;
  int64_t k;
  const void* const* acts;  // one pointer a token, to k activations and zeros up to padded(k)
  float* const* out;        // one pointer a token
  int64_t tokens;
};

struct FormatKernels {
  int act_bytes;  // bytes of one activation: 2 if the instruction set multiplies bf16, else 4
                  // (float)
  void (*matmul)(const MatmulArgs& args);
  // act[i] = x[i] * scale for i < n, then zeros up to padded(n).
  void (*pack)(const void* x, Scalar type, int64_t n, float scale, void* act);
  // act[i] = activation(gate[i]) * up[i] for i < n.
  void (*activate)(Activation activation, const float* gate, const float* up, int64_t n, void* act);
};

struct Kernels {
  const char* isa;
  FormatKernels bf16;
  FormatKernels fp16;
  // out[h] = sum over j of weights[j] * rows[j * stride + h], in the order of j, skipping ids < 0.
  void (*combine)(const float* rows, int64_t stride, const float* weights, const int32_t* ids,
                  int topk, int64_t n, Scalar type, void* out);

  const FormatKernels& of(Format format) const { return format == Format::kBf16 ? bf16 : fp16; }
};

// Activation rows are padded with zeros to whole vectors.
constexpr int64_t kActPadding = 32;
constexpr int64_t padded(int64_t n) { return (n + kActPadding - 1) / kActPadding * kActPadding; }

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_bf16_kernels();

// The kernels named "portable", "avx2" or "avx512_bf16", or the best that this CPU runs if `isa` is
// empty. Throws std::invalid_argument for another name or one this CPU cannot run.
const Kernels& choose_kernels(const std::string& isa);

}  // namespace lk

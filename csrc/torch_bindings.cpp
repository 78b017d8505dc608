// torch.ops.lvllm: the engine as PyTorch operators. This is the only file that knows torch, and it
// uses nothing but torch's stable ABI, so that one binary works with PyTorch 2.11 and later and
// with any Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "lk/blocks.h"
#include "lk/deferral.h"
#include "lk/engine.h"
#include "lk/free_memory.h"
#include "lk/host_call.h"
#include "lk/integers.h"
#include "lk/mailbox.h"
#include "lk/memory.h"
#include "lk/nodes.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

lk::Scalar scalar_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return lk::Scalar::kBf16;
    case ScalarType::Half:
      return lk::Scalar::kFp16;
    default:
      fail(std::string(name) + " must be bfloat16 or float16");
  }
}

using OptionalTensor = std::optional<Tensor>;

template <class T>
T* data_of(const OptionalTensor& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

// The formats of blocks by their names, with activations of 16 and of 8 bits.
struct BlockFormat {
  const char* name;
  lk::Format act16, act8;
};
constexpr BlockFormat kBlockFormats[] = {
    {"q2_k", lk::Format::kQ2K, lk::Format::kQ2KAct8},
    {"q3_k", lk::Format::kQ3K, lk::Format::kQ3KAct8},
    {"q4_k", lk::Format::kQ4K, lk::Format::kQ4KAct8},
    {"q5_k", lk::Format::kQ5K, lk::Format::kQ5KAct8},
    {"q6_k", lk::Format::kQ6K, lk::Format::kQ6KAct8},
    {"q4_1", lk::Format::kQ41, lk::Format::kQ41Act8},
    {"q5_0", lk::Format::kQ50, lk::Format::kQ50Act8},
    {"q5_1", lk::Format::kQ51, lk::Format::kQ51Act8},
    {"iq4_nl", lk::Format::kIq4Nl, lk::Format::kIq4NlAct8},
    {"iq4_xs", lk::Format::kIq4Xs, lk::Format::kIq4XsAct8},
    {"iq1_s", lk::Format::kIq1S, lk::Format::kIq1SAct8},
    {"iq1_m", lk::Format::kIq1M, lk::Format::kIq1MAct8},
    {"iq2_xxs", lk::Format::kIq2Xxs, lk::Format::kIq2XxsAct8},
    {"iq2_xs", lk::Format::kIq2Xs, lk::Format::kIq2XsAct8},
    {"iq2_s", lk::Format::kIq2S, lk::Format::kIq2SAct8},
    {"iq3_xxs", lk::Format::kIq3Xxs, lk::Format::kIq3XxsAct8},
    {"iq3_s", lk::Format::kIq3S, lk::Format::kIq3SAct8},
};

lk::Format format_of(const std::string& name, bool act8, bool groups = false,
                     bool zero_points = false) {
  using lk::Format;
  if (name == "bf16") return Format::kBf16;
  if (name == "fp16") return Format::kFp16;
  if (name == "fp8") return Format::kFp8;
  if (name == "int8" && groups) return act8 ? Format::kInt8GroupsAct8 : Format::kInt8Groups;
  if (name == "int8") return act8 ? Format::kInt8Act8 : Format::kInt8;
  if (name == "mxfp4" || name == "nvfp4") return act8 ? Format::kFp4Act8 : Format::kFp4;
  for (const BlockFormat& format : kBlockFormats) {
    if (name == format.name) return act8 ? format.act8 : format.act16;
  }
  if (name != "int4") fail("format is \"" + name + "\"");
  if (zero_points) return act8 ? Format::kInt4ZeroAct8 : Format::kInt4Zero;
  return act8 ? Format::kInt4Act8 : Format::kInt4;
}

lk::Activation activation_of(const std::string& name) {
  using lk::Activation;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "swigluoai") return Activation::kSwigluOai;
  if (name == "swiglustep") return Activation::kSwigluStep;
  if (name != "relu2") fail("activation is \"" + name + "\"");
  return Activation::kRelu2;
}

lk::ScaleType scale_type_of(const Tensor& scale) {
  switch (scale.scalar_type()) {
    case ScalarType::BFloat16:
      return lk::ScaleType::kBf16;
    case ScalarType::Half:
      return lk::ScaleType::kFp16;
    case ScalarType::Float:
      return lk::ScaleType::kFloat;
    case ScalarType::Byte:
      return lk::ScaleType::kE8m0;
    case ScalarType::Float8_e4m3fn:
      return lk::ScaleType::kE4m3;
    default:
      fail("scales must be bfloat16, float16, float32, uint8 (e8m0) or float8_e4m3fn");
  }
}

// The tensors of a layer by the names of their arguments.
class NamedTensors {
 public:
  NamedTensors(const std::vector<std::string>& names, const std::vector<Tensor>& tensors) {
    if (names.size() != tensors.size()) {
      fail("there are " + std::to_string(names.size()) + " names for " +
           std::to_string(tensors.size()) + " tensors");
    }
    for (size_t i = 0; i < names.size(); ++i) {
      if (std::find(std::begin(kNames), std::end(kNames), names[i]) == std::end(kNames)) {
        fail("\"" + names[i] + "\" is no tensor of a layer");
      }
      if (!tensors_.emplace(names[i], tensors[i]).second) {
        fail("two tensors are named " + names[i]);
      }
    }
  }

  OptionalTensor find(const std::string& name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? std::nullopt : OptionalTensor(found->second);
  }
  const Tensor& get(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) fail(name + " is missing");
    return found->second;
  }

 private:
  static constexpr const char* kNames[] = {
      "w13", "w13_scale", "w13_zero", "w13_global_scale", "w13_bias",  //
      "w3",  "w3_scale",                                               //
      "w2",  "w2_scale",  "w2_zero",  "w2_global_scale",  "w2_bias",   //
      "w",   "w_scale",   "w_zero",   "w_global_scale",   "w_bias"};

  std::map<std::string, Tensor> tensors_;
};

// The format of matrices like the one of this name, which says what scales they have.
lk::Format format_of(const std::string& format, bool act8, const NamedTensors& tensors,
                     const std::string& name) {
  const OptionalTensor scale = tensors.find(name + "_scale");
  return format_of(format, act8, scale && scale->dim() == 3,
                   tensors.find(name + "_zero").has_value());
}

// The matrix named "w13", "w3", "w2" or, of a linear layer, "w".
lk::Matrix matrix_of(const std::string& format, int64_t activation_bits, int64_t group_size,
                     const NamedTensors& tensors, const std::string& name, int64_t parts,
                     int64_t k) {
  const Tensor& weights = tensors.get(name);
  const OptionalTensor scale = tensors.find(name + "_scale");
  lk::Matrix m;
  m.format = format_of(format, activation_bits == 8, tensors, name);
  m.weights = static_cast<char*>(weights.mutable_data_ptr());
  m.parts = parts;
  m.rows = weights.size(1) / parts;
  m.k = k;
  m.row_bytes = weights.size(2) * static_cast<int64_t>(weights.element_size());
  m.zero = data_of<uint8_t>(tensors.find(name + "_zero"));
  m.bias = data_of<float>(tensors.find(name + "_bias"));
  m.part_scale = data_of<float>(tensors.find(name + "_global_scale"));
  if (const lk::BlockLayout* const blocks = lk::block_layout(m.format)) {
    m.scale_type = lk::ScaleType::kInBlocks;
    m.group = blocks->group;
  }
  if (!scale) return m;
  if (format == "fp8" && scale->dim() == 3) {
    m.scale_type = lk::ScaleType::kFloatBlocks;
    m.scale = data_of<char>(scale);
    m.group = 128;
  } else if (scale->dim() == 3) {
    m.scale_type = scale_type_of(*scale);
    m.scale = data_of<char>(scale);
    // Where a whole row is one group, its size is rounded up to whole blocks of activations.
    m.group = group_size < k ? group_size : lk::round_up(k, lk::kActBlock);
  } else if (scale->dim() == 2) {
    m.row_scale = data_of<float>(scale);
  } else {
    m.part_scale = data_of<float>(scale);
    m.shared_part_scale = true;
  }
  return m;
}

// The caller, expert_layer.py, has checked the tensors: they are on the CPU and contiguous, with
// the right dtypes and shapes. It keeps them alive as long as the layer. Tensors come by name, so
// that no two of them can be swapped unnoticed.
int64_t layer_create(const std::string& format, const std::string& w3_format,
                     const std::string& w2_format, const std::string& activation,
                     int64_t activation_bits, int64_t w3_activation_bits,
                     int64_t w2_activation_bits, int64_t group_size, bool interleaved,
                     double swiglu_alpha, double swiglu_beta, double swiglu_limit,
                     bool weight_on_input, bool ordered, const std::vector<std::string>& names,
                     const std::vector<Tensor>& named) {
  const NamedTensors tensors(names, named);
  lk::LayerSpec layer;
  layer.activation = {.kind = activation_of(activation),
                      .alpha = static_cast<float>(swiglu_alpha),
                      .limit = static_cast<float>(swiglu_limit),
                      .beta = static_cast<float>(swiglu_beta)};
  layer.weight_on_input = weight_on_input;
  const bool has_w3 = tensors.find("w3").has_value();
  const int64_t parts = lk::has_gate(layer.activation.kind) && !has_w3 ? 2 : 1;
  layer.experts = tensors.get("w13").size(0);
  layer.hidden = tensors.get("w2").size(1);
  layer.intermediate = tensors.get("w13").size(1) / parts;
  layer.w13 = matrix_of(format, activation_bits, group_size, tensors, "w13", parts, layer.hidden);
  layer.w13.interleaved = interleaved;
  if (has_w3) {
    layer.w3 = matrix_of(w3_format, w3_activation_bits, group_size, tensors, "w3", 1, layer.hidden);
  }
  layer.w2 =
      matrix_of(w2_format, w2_activation_bits, group_size, tensors, "w2", 1, layer.intermediate);
  return lk::create_layer(layer, ordered);
}

// The engine has pointers to the counters of layers. This keeps them alive.
class KeptCounters {
 public:
  void keep(int64_t layer, const Tensor& counters) {
    const std::lock_guard lock(mutex_);
    tensors_.insert_or_assign(layer, counters);
  }
  void drop(int64_t layer) {
    const std::lock_guard lock(mutex_);
    tensors_.erase(layer);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, Tensor> tensors_;
};

KeptCounters& kept_counters() {
  static auto* kept = new KeptCounters;  // never destroyed: at exit PyTorch ends first
  return *kept;
}

void layer_destroy(int64_t handle) {
  lk::destroy_layer(handle);
  kept_counters().drop(handle);
}
void layer_restore(int64_t handle) {
  lk::restore_layer(handle);
  kept_counters().drop(handle);
}

// The batch of these tensors; y is still missing.
lk::Batch batch_of(const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights) {
  if (!x.is_cpu() || !topk_ids.is_cpu() || !topk_weights.is_cpu()) {
    fail("x, topk_ids and topk_weights must be CPU tensors");
  }
  if (x.dim() != 2 || (x.size(0) > 0 && x.size(1) > 1 && x.stride(1) != 1)) {
    fail("x must be [tokens, hidden] with contiguous rows");
  }
  const int64_t tokens = x.size(0);
  if (topk_ids.dim() != 2 || topk_ids.size(0) != tokens || !topk_ids.is_contiguous()) {
    fail("topk_ids must be a contiguous [tokens, topk] tensor");
  }
  if (topk_weights.dim() != 2 || topk_weights.size(0) != tokens ||
      topk_weights.size(1) != topk_ids.size(1) || !topk_weights.is_contiguous() ||
      topk_weights.scalar_type() != ScalarType::Float) {
    fail("topk_weights must be a contiguous float32 tensor of the shape of topk_ids");
  }
  lk::Batch batch;
  batch.type = scalar_of(x, "x");
  batch.tokens = tokens;
  batch.topk = topk_ids.size(1);
  batch.x = x.data_ptr();
  batch.x_stride = x.stride(0);
  batch.weights = static_cast<const float*>(topk_weights.data_ptr());
  if (topk_ids.scalar_type() == ScalarType::Int) {
    batch.ids = static_cast<const int32_t*>(topk_ids.data_ptr());
  } else if (topk_ids.scalar_type() == ScalarType::Long) {
    batch.ids64 = static_cast<const int64_t*>(topk_ids.data_ptr());
  } else {
    fail("topk_ids must be int32 or int64");
  }
  return batch;
}

// The same for a linear layer, whose matrix comes as that of a single expert.
int64_t linear_create(const std::string& format, int64_t activation_bits, int64_t group_size,
                      int64_t k, const std::vector<std::string>& names,
                      const std::vector<Tensor>& named) {
  const NamedTensors tensors(names, named);
  return lk::create_linear(
      {.matrix = matrix_of(format, activation_bits, group_size, tensors, "w", 1, k)});
}

void linear_destroy(int64_t handle) { lk::destroy_linear(handle); }

int64_t handle_of(const Tensor& layer) {
  if (!layer.is_cpu() || layer.numel() != 1 || layer.scalar_type() != ScalarType::Long) {
    fail("layer must be a handle: an int64 scalar tensor on the CPU");
  }
  return *static_cast<const int64_t*>(layer.data_ptr());
}

Tensor linear(const Tensor& x, const Tensor& layer, int64_t rows) {
  if (!x.is_cpu() || x.dim() != 2 || (x.size(0) > 0 && x.size(1) > 1 && x.stride(1) != 1)) {
    fail("x must be a CPU tensor [tokens, input size] with contiguous rows");
  }
  const int64_t sizes[2] = {x.size(0), rows};
  Tensor y = torch::stable::new_empty(x, {sizes, 2});
  lk::run_linear(handle_of(layer),
                 {.type = scalar_of(x, "x"),
                  .tokens = x.size(0),
                  .x = x.data_ptr(),
                  .x_stride = x.stride(0),
                  .y = y.data_ptr()},
                 x.size(1), rows);
  return y;
}

Tensor expert_block(const Tensor& x, const Tensor& topk_ids, const Tensor& topk_weights,
                    const Tensor& layer) {
  lk::Batch batch = batch_of(x, topk_ids, topk_weights);
  const int64_t sizes[2] = {batch.tokens, x.size(1)};
  Tensor y = torch::stable::new_empty(x, {sizes, 2});
  batch.y = y.data_ptr();
  lk::run_layer(handle_of(layer), batch, x.size(1));
  return y;
}

int64_t host_call_create() { return reinterpret_cast<int64_t>(new lk::HostCall); }

lk::HostCall& host_call(int64_t address) { return *reinterpret_cast<lk::HostCall*>(address); }

void host_call_fill(int64_t address, int64_t layer, const Tensor& x, const Tensor& topk_ids,
                    const Tensor& topk_weights, const Tensor& y, int64_t first_row,
                    int64_t reason) {
  lk::HostCall& call = host_call(address);
  call.batch = batch_of(x, topk_ids, topk_weights);
  if (!y.is_cpu() || y.dim() != 2 || y.size(0) != x.size(0) || y.size(1) != x.size(1) ||
      y.scalar_type() != x.scalar_type() || !y.is_contiguous()) {
    fail("y must be a contiguous CPU tensor of x's shape and dtype");
  }
  call.layer = layer;
  call.hidden = x.size(1);
  call.batch.y = y.mutable_data_ptr();
  call.batch.first_row = first_row;
  if (reason < 0 || reason >= lk::kReasons) fail("reason is " + std::to_string(reason));
  call.batch.reason = static_cast<lk::Reason>(reason);
  call.deferral = nullptr;
}

int64_t deferral_create(int64_t experts, int64_t tokens, int64_t hidden, int64_t topk) {
  return reinterpret_cast<int64_t>(new lk::Deferral(experts, tokens, hidden, topk));
}

void deferral_destroy(int64_t deferral) { delete reinterpret_cast<lk::Deferral*>(deferral); }

// After host_call_fill: lets the call defer and add experts.
void host_call_defer(int64_t address, int64_t deferral, bool first, bool last) {
  lk::HostCall& call = host_call(address);
  call.deferral = reinterpret_cast<lk::Deferral*>(deferral);
  call.first = first;
  call.last = last;
}

int64_t host_call_ended(int64_t address) {
  return host_call(address).ended.load(std::memory_order_acquire);
}

int64_t host_call_function() { return reinterpret_cast<int64_t>(&lk::lk_run_host_call); }

std::tuple<int64_t, std::string> host_call_error() {
  const lk::HostCallError error = lk::take_host_call_error();
  return {error.layer, error.text};
}

std::tuple<int64_t, int64_t, int64_t> host_call_progress() {
  const lk::HostCallProgress progress = lk::host_call_progress();
  return {progress.begun, progress.ended, progress.layer};
}

int64_t mailbox_create(const Tensor& words) {
  if (!words.is_cpu() || words.scalar_type() != ScalarType::Long || !words.is_contiguous() ||
      words.numel() * sizeof(int64_t) != sizeof(lk::MailboxWords)) {
    fail("words must be a contiguous int64 CPU tensor [16]");
  }
  void* memory = words.mutable_data_ptr();
  if (reinterpret_cast<uintptr_t>(memory) % alignof(lk::MailboxWords) != 0) {
    fail("words must begin at a multiple of 64 bytes");
  }
  return reinterpret_cast<int64_t>(new lk::Mailbox(new (memory) lk::MailboxWords));
}

void mailbox_destroy(int64_t mailbox) { delete reinterpret_cast<lk::Mailbox*>(mailbox); }

void reserve(int64_t layer, int64_t tokens, int64_t topk) { lk::reserve(layer, tokens, topk); }

// The engine has a pointer to the log, so this keeps it alive until the next log comes.
void watch(const OptionalTensor& log) {
  static std::mutex mutex;
  static auto* kept = new OptionalTensor;  // never destroyed: at exit PyTorch ends first
  const std::lock_guard lock(mutex);
  if (!log) {
    lk::watch(nullptr, 0);
  } else {
    if (!log->is_cpu() || log->dim() != 2 || log->size(0) < 2 || log->size(1) != 3 ||
        !log->is_contiguous() || log->scalar_type() != ScalarType::Long) {
      fail("log must be a contiguous int64 CPU tensor of shape [rows + 2, 3]");
    }
    lk::watch(static_cast<lk::LoggedFault*>(log->mutable_data_ptr()), log->size(0) - 2);
  }
  *kept = log;
}

void count(int64_t layer, const OptionalTensor& counters) {
  if (!counters) {
    lk::count(layer, nullptr, 0);
    kept_counters().drop(layer);
    return;
  }
  if (!counters->is_cpu() || counters->dim() != 1 || !counters->is_contiguous() ||
      counters->scalar_type() != ScalarType::Long) {
    fail("counters must be a contiguous int64 CPU tensor of one dimension");
  }
  lk::count(layer, static_cast<int64_t*>(counters->mutable_data_ptr()), counters->numel());
  kept_counters().keep(layer, *counters);
}

// A uint8 tensor of memory of the engine, which gets it back when the tensor's storage dies.
Tensor tensor_of(void* memory, int64_t bytes) {
  const int64_t size[1] = {bytes};
  const int64_t stride[1] = {1};
  return torch::stable::from_blob(memory, {size, 1}, {stride, 1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Byte, [](void* data) { lk::release(data); });
}

Tensor allocate(int64_t experts, int64_t parts, int64_t rows, int64_t row_bytes) {
  const lk::RowLayout layout{experts, parts, rows, row_bytes};
  return tensor_of(lk::allocate_bank(layout), layout.bytes());
}

// Memory of another process's engine, read-only.
Tensor map_shared(int64_t descriptor, int64_t bytes) {
  return tensor_of(lk::map_shared(static_cast<int>(descriptor), bytes), bytes);
}

// Returns {descriptor, offset, bytes}.
std::vector<int64_t> shared_place(int64_t address) {
  const lk::SharedPlace place = lk::shared_place(reinterpret_cast<const void*>(address));
  return {place.descriptor, place.offset, place.bytes};
}

void configure(int64_t threads, const std::string& binding, bool power_saving, bool own_cores,
               const std::vector<int64_t>& cpus, const std::string& topology,
               const std::string& isa, bool interleave, bool shared) {
  lk::EngineOptions options;
  options.pool.threads = static_cast<int>(threads);
  options.pool.binding = binding == "NUMA_NODE" ? lk::Binding::kNumaNode : lk::Binding::kCpuCore;
  options.pool.power_saving = power_saving;
  options.pool.own_cores = own_cores;
  options.cpus.assign(cpus.begin(), cpus.end());
  options.topology = topology;
  options.isa = isa;
  options.interleave = interleave;
  options.shared = shared;
  lk::configure(options);
}

template <class List>
std::string json(const List& values) {
  std::ostringstream text;
  const char* comma = "";
  text << "[";
  for (const auto& value : values) {
    text << comma << value;
    comma = ", ";
  }
  text << "]";
  return text.str();
}

// Returns JSON: {"isa", "rates": [{"isa", "arithmetic", "weights"}, ...], "binding",
// "power_saving", "own_cores", "nodes": [number, ...], "workers": [{"node", "cpus"}, ...]}.
std::string info() {
  const lk::EngineInfo info = lk::engine_info();
  std::vector<std::string> workers;
  for (const lk::Worker& worker : info.plan.workers) {
    workers.push_back("{\"node\": " + std::to_string(info.plan.nodes[worker.node]) +
                      ", \"cpus\": " + json(worker.cpus) + "}");
  }
  std::vector<std::string> rates;
  for (const lk::Rate& rate : info.rates) {
    rates.push_back(std::string("{\"isa\": \"") + rate.isa + "\", \"arithmetic\": \"" +
                    rate.arithmetic + "\", \"weights\": " + std::to_string(rate.weights) + "}");
  }
  const bool node_bound = info.options.binding == lk::Binding::kNumaNode;
  return std::string("{\"isa\": \"") + info.kernels->isa + "\", \"rates\": " + json(rates) +
         ", \"binding\": \"" + (node_bound ? "NUMA_NODE" : "CPU_CORE") +
         "\", \"power_saving\": " + (info.options.power_saving ? "true" : "false") +
         ", \"own_cores\": " + (info.options.own_cores ? "true" : "false") +
         ", \"nodes\": " + json(info.plan.nodes) + ", \"workers\": " + json(workers) + "}";
}

// Puts matrices of blocks, uint8 [experts, rows, bytes], back into the order of a file, in place.
void restore_blocks(const std::string& format, const Tensor& matrices, int64_t parts) {
  const lk::BlockLayout* const layout = lk::block_layout(format_of(format, false));
  if (layout == nullptr) fail("format \"" + format + "\" has no blocks");
  if (matrices.dim() != 3 || !matrices.is_cpu() || !matrices.is_contiguous() ||
      matrices.scalar_type() != ScalarType::Byte || parts < 1 || matrices.size(1) % parts != 0 ||
      matrices.size(2) % layout->block_bytes != 0) {
    fail("matrices must be contiguous uint8 [experts, rows, bytes] with whole blocks");
  }
  const int64_t rows = matrices.size(1) / parts;
  const int64_t row_bytes = matrices.size(2);
  std::vector<char> buffer(lk::kTileRows * row_bytes);
  auto* part = static_cast<char*>(matrices.mutable_data_ptr());
  for (int64_t i = 0; i < matrices.size(0) * parts; ++i, part += rows * row_bytes) {
    for (int64_t tile = 0; tile < lk::tile_count(rows); ++tile) {
      lk::restore_blocks(*layout, part + lk::tile_offset(tile, row_bytes),
                         lk::tile_rows(tile, rows), row_bytes, buffer.data());
    }
  }
}

// The instruction set and the arithmetic that multiply experts of a format.
std::tuple<std::string, std::string> arithmetic(const std::string& format,
                                                int64_t activation_bits) {
  const lk::FormatKernels& kernels =
      lk::engine_info().kernels->of(format_of(format, activation_bits == 8));
  return {kernels.isa, kernels.arithmetic};
}

// The same in all instruction sets of this CPU, one pair after the other.
std::vector<std::string> arithmetics(const std::string& format, int64_t activation_bits) {
  std::vector<std::string> pairs;
  for (const std::string& isa : lk::available_kernels()) {
    pairs.push_back(isa);
    const lk::Format of = format_of(format, activation_bits == 8);
    pairs.push_back(lk::kernels_named(isa).of(of).arithmetic);
  }
  return pairs;
}

// Returns JSON: [{"id", "memory_bytes", "cores": [[cpu, ...], ...]}, ...].
std::string topology() {
  std::vector<std::string> nodes;
  for (const lk::Node& node : lk::engine_topology().nodes) {
    std::vector<std::string> cores;
    for (const lk::Core& core : node.cores) cores.push_back(json(core.cpus));
    nodes.push_back("{\"id\": " + std::to_string(node.id) + ", \"memory_bytes\": " +
                    std::to_string(node.memory_bytes) + ", \"cores\": " + json(cores) + "}");
  }
  return json(nodes);
}

// Returns JSON: [{"id", "total_bytes", "free_bytes", "distances": [distance, ...]}, ...], an entry
// for each NUMA node in <sysfs>/devices/system/node, by rising number. Distances are those to the
// nodes of this list, in its order; the list of distances is empty if the kernel does not tell. The
// configured topology does not matter.
std::string numa_memory(const std::string& sysfs) {
  std::vector<std::string> nodes;
  for (const lk::NodeMemory& node : lk::node_memory(sysfs)) {
    nodes.push_back("{\"id\": " + std::to_string(node.id) +
                    ", \"total_bytes\": " + std::to_string(node.total_bytes) +
                    ", \"free_bytes\": " + std::to_string(node.free_bytes) +
                    ", \"distances\": " + json(node.distances) + "}");
  }
  return json(nodes);
}

// The kernel's numbers of the NUMA nodes whose memory this process may use.
std::vector<int64_t> memory_nodes() {
  const std::vector<int> nodes = lk::memory_nodes();
  return {nodes.begin(), nodes.end()};
}

int64_t available_bytes() { return lk::available_bytes(); }
int64_t allocated_bytes() { return lk::allocated_bytes(); }

std::vector<int64_t> page_nodes(const std::vector<int64_t>& addresses) {
  std::vector<const void*> pages;
  for (int64_t address : addresses) pages.push_back(reinterpret_cast<const void*>(address));
  const std::vector<int> nodes = lk::page_nodes(pages);
  return {nodes.begin(), nodes.end()};
}

}  // namespace

STABLE_TORCH_LIBRARY(lvllm, m) {
  // The handle is a tensor and not an int, because torch.compile makes a tensor a graph input. An
  // int would become a constant, and a cached graph would keep the handle of an earlier process.
  m.def("expert_block(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor layer) -> Tensor");
  m.def(
      "layer_create(*, str format, str w3_format, str w2_format, str activation, "
      "int activation_bits, int w3_activation_bits, int w2_activation_bits, int group_size, "
      "bool interleaved, float swiglu_alpha, float swiglu_beta, float swiglu_limit, "
      "bool weight_on_input, bool ordered, str[] names, Tensor(a!)[] tensors) -> int");
  m.def("linear(Tensor x, Tensor layer, int rows) -> Tensor");
  m.def(
      "linear_create(*, str format, int activation_bits, int group_size, int k, str[] names, "
      "Tensor(a!)[] tensors) -> int");
  m.def("linear_destroy(int handle) -> ()");
  m.def("layer_destroy(int handle) -> ()");
  m.def("layer_restore(int handle) -> ()");
  m.def("watch(Tensor(a!)? log) -> ()");
  m.def("count(int layer, Tensor(a!)? counters) -> ()");
  m.def("reserve(int layer, int tokens, int topk) -> ()");
  m.def("host_call_create() -> int");
  m.def(
      "host_call_fill(int call, int layer, Tensor x, Tensor topk_ids, Tensor topk_weights, "
      "Tensor(a!) y, int first_row, int reason) -> ()");
  m.def("host_call_defer(int call, int deferral, bool first, bool last) -> ()");
  m.def("host_call_ended(int call) -> int");
  m.def("host_call_function() -> int");
  m.def("host_call_error() -> (int, str)");
  m.def("host_call_progress() -> (int, int, int)");
  m.def("deferral_create(int experts, int tokens, int hidden, int topk) -> int");
  m.def("deferral_destroy(int deferral) -> ()");
  m.def("mailbox_create(Tensor(a!) words) -> int");
  m.def("mailbox_destroy(int mailbox) -> ()");
  m.def("allocate(int experts, int parts, int rows, int row_bytes) -> Tensor");
  m.def("map_shared(int descriptor, int bytes) -> Tensor");
  m.def("shared_place(int address) -> int[]");
  m.def(
      "configure(int threads, str binding, bool power_saving, bool own_cores, int[] cpus, "
      "str topology, str isa, bool interleave, bool shared) -> ()");
  m.def("info() -> str");
  m.def("arithmetic(str format, int activation_bits) -> (str, str)");
  m.def("arithmetics(str format, int activation_bits) -> str[]");
  m.def("topology() -> str");
  m.def("restore_blocks(str format, Tensor(a!) matrices, int parts) -> ()");
  m.def("numa_memory(str sysfs=\"/sys\") -> str");
  m.def("memory_nodes() -> int[]");
  m.def("available_bytes() -> int");
  m.def("allocated_bytes() -> int");
  m.def("page_nodes(int[] addresses) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(lvllm, CPU, m) {
  m.impl("expert_block", TORCH_BOX(&expert_block));
  m.impl("linear", TORCH_BOX(&linear));
}

STABLE_TORCH_LIBRARY_IMPL(lvllm, CompositeExplicitAutograd, m) {
  m.impl("layer_create", TORCH_BOX(&layer_create));
  m.impl("linear_create", TORCH_BOX(&linear_create));
  m.impl("linear_destroy", TORCH_BOX(&linear_destroy));
  m.impl("layer_destroy", TORCH_BOX(&layer_destroy));
  m.impl("layer_restore", TORCH_BOX(&layer_restore));
  m.impl("watch", TORCH_BOX(&watch));
  m.impl("count", TORCH_BOX(&count));
  m.impl("reserve", TORCH_BOX(&reserve));
  m.impl("host_call_create", TORCH_BOX(&host_call_create));
  m.impl("host_call_fill", TORCH_BOX(&host_call_fill));
  m.impl("host_call_defer", TORCH_BOX(&host_call_defer));
  m.impl("host_call_ended", TORCH_BOX(&host_call_ended));
  m.impl("host_call_function", TORCH_BOX(&host_call_function));
  m.impl("host_call_error", TORCH_BOX(&host_call_error));
  m.impl("host_call_progress", TORCH_BOX(&host_call_progress));
  m.impl("deferral_create", TORCH_BOX(&deferral_create));
  m.impl("deferral_destroy", TORCH_BOX(&deferral_destroy));
  m.impl("mailbox_create", TORCH_BOX(&mailbox_create));
  m.impl("mailbox_destroy", TORCH_BOX(&mailbox_destroy));
  m.impl("allocate", TORCH_BOX(&allocate));
  m.impl("map_shared", TORCH_BOX(&map_shared));
  m.impl("shared_place", TORCH_BOX(&shared_place));
  m.impl("configure", TORCH_BOX(&configure));
  m.impl("info", TORCH_BOX(&info));
  m.impl("arithmetic", TORCH_BOX(&arithmetic));
  m.impl("arithmetics", TORCH_BOX(&arithmetics));
  m.impl("topology", TORCH_BOX(&topology));
  m.impl("restore_blocks", TORCH_BOX(&restore_blocks));
  m.impl("numa_memory", TORCH_BOX(&numa_memory));
  m.impl("memory_nodes", TORCH_BOX(&memory_nodes));
  m.impl("available_bytes", TORCH_BOX(&available_bytes));
  m.impl("allocated_bytes", TORCH_BOX(&allocated_bytes));
  m.impl("page_nodes", TORCH_BOX(&page_nodes));
}

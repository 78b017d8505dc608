#include "lk/moe.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <new>
#include <random>
#include <vector>

#define LK_ISA test_reference
#include "lk/simd.h"

namespace {
std::atomic<int64_t> allocations{0};
}

// Counts what the hot path allocates.
void* operator new(size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace lk {
namespace {

using test_reference::bf16_to_float;
using test_reference::float_to_bf16;

// A layer and a batch of random values.
struct Case {
  LayerSpec layer;
  Batch batch;
  std::vector<uint16_t> w13, w2, x, y;
  std::vector<int32_t> ids;
  std::vector<float> weights;

  Case(int64_t tokens, int64_t hidden, int64_t intermediate, int experts, int64_t topk) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<uint16_t>& values, int64_t size, float scale) {
      values.resize(size);
      for (auto& value : values) value = float_to_bf16(normal(random) * scale);
    };
    fill(w13, experts * 2 * intermediate * hidden, 1 / std::sqrt(static_cast<float>(hidden)));
    fill(w2, experts * intermediate * hidden, 1 / std::sqrt(static_cast<float>(intermediate)));
    fill(x, tokens * hidden, 1);
    y.resize(tokens * hidden);
    for (int64_t slot = 0; slot < tokens * topk; ++slot) {
      ids.push_back(static_cast<int32_t>(random() % (experts + 1)) - 1);
      weights.push_back(normal(random));
    }
    layer = {.experts = experts,
             .hidden = hidden,
             .intermediate = intermediate,
             .w13 = w13.data(),
             .w2 = w2.data()};
    batch = {.tokens = tokens,
             .topk = topk,
             .x = x.data(),
             .x_stride = hidden,
             .ids = ids.data(),
             .weights = weights.data(),
             .y = y.data()};
  }

  std::vector<double> reference() const {
    const int64_t hidden = layer.hidden;
    const int64_t intermediate = layer.intermediate;
    std::vector<double> out(batch.tokens * hidden, 0.0);
    for (int64_t slot = 0; slot < batch.tokens * batch.topk; ++slot) {
      if (ids[slot] < 0) continue;
      const int64_t token = slot / batch.topk;
      std::vector<double> inter(2 * intermediate, 0.0);
      for (int64_t r = 0; r < 2 * intermediate; ++r) {
        for (int64_t i = 0; i < hidden; ++i) {
          inter[r] += double{bf16_to_float(w13[(ids[slot] * 2 * intermediate + r) * hidden + i])} *
                      bf16_to_float(x[token * hidden + i]);
        }
      }
      for (int64_t h = 0; h < hidden; ++h) {
        double sum = 0;
        for (int64_t i = 0; i < intermediate; ++i) {
          const double gate = inter[i];
          sum += bf16_to_float(w2[(ids[slot] * hidden + h) * intermediate + i]) * gate /
                 (1 + std::exp(-gate)) * inter[intermediate + i];
        }
        out[token * hidden + h] += weights[slot] * sum;
      }
    }
    return out;
  }
};

TEST(ExpertBlock, MatchesTheReference) {
  for (const char* isa : {"portable", "avx2", "avx512_bf16", ""}) {
    const Kernels* kernels = nullptr;
    try {
      kernels = &choose_kernels(isa);
    } catch (const std::invalid_argument&) {
      continue;  // not on this CPU
    }
    for (int64_t tokens : {1, 2, 17, 60}) {
      Case c(tokens, 67, 45, 3, 2);
      ThreadPool pool(parse_topology("2 nodes x 2,1 cores x 1 threads"), {});
      Workspace workspace;
      expert_block(c.layer, c.batch, *kernels, pool, workspace);
      const std::vector<double> want = c.reference();
      double error = 0;
      double norm = 0;
      for (size_t i = 0; i < want.size(); ++i) {
        error += std::pow(bf16_to_float(c.y[i]) - want[i], 2);
        norm += want[i] * want[i];
      }
      EXPECT_LT(std::sqrt(error / norm), 4e-3) << isa << " " << tokens;
    }
  }
}

TEST(ExpertBlock, SameBitsOnAnyPool) {
  Case c(23, 67, 45, 3, 2);
  Workspace workspace;
  std::vector<uint16_t> first;
  for (const char* topology :
       {"1 node x 1 cores x 1 threads", "1 node x 7 cores x 1 threads",
        "4 nodes x 1,2,0,3 cores x 2 threads", "32 nodes x 1 cores x 1 threads"}) {
    ThreadPool pool(parse_topology(topology), {});
    expert_block(c.layer, c.batch, choose_kernels(""), pool, workspace);
    if (first.empty()) first = c.y;
    EXPECT_EQ(c.y, first) << topology;
  }
}

TEST(ExpertBlock, AllocatesNothingAfterTheFirstCall) {
  Case c(23, 67, 45, 3, 2);
  ThreadPool pool(parse_topology("2 nodes x 2 cores x 1 threads"), {});
  Workspace workspace;
  const Kernels& kernels = choose_kernels("");
  expert_block(c.layer, c.batch, kernels, pool, workspace);
  const float* scratch = workspace.partial.data();
  const int64_t before = allocations;
  for (int64_t tokens : {23, 1, 7}) {
    c.batch.tokens = tokens;
    expert_block(c.layer, c.batch, kernels, pool, workspace);
  }
  EXPECT_EQ(allocations, before);
  EXPECT_EQ(workspace.partial.data(), scratch);
}

TEST(ExpertBlock, RefusesIdsThatAreNoExperts) {
  Case c(4, 8, 8, 3, 2);
  ThreadPool pool(parse_topology("1 node x 1 cores x 1 threads"), {});
  Workspace workspace;
  for (int32_t wrong : {-2, 3, 1 << 30}) {
    c.ids[5] = wrong;
    EXPECT_THROW(expert_block(c.layer, c.batch, choose_kernels(""), pool, workspace),
                 std::invalid_argument);
  }
}

}  // namespace
}  // namespace lk

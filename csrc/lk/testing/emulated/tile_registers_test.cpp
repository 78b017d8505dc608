// Compares the emulated tile instructions with their definitions in Intel's Software Developer's
// Manual, volume 2.
#include "lk/testing/emulated/tile_registers.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "lk/testing/emulated/definitions.h"

namespace lk::emulated {
namespace {

using namespace definitions;

struct Config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 2 for C += A * B: `tokens` x `columns` lanes and `steps` between them.
Config product_config(int tokens, int steps, int columns) {
  Config config;
  const int shapes[3][2] = {{tokens, columns}, {tokens, steps}, {steps, columns}};
  for (int i = 0; i < 3; ++i) {
    config.rows[i] = static_cast<uint8_t>(shapes[i][0]);
    config.row_bytes[i] = static_cast<uint16_t>(4 * shapes[i][1]);
  }
  return config;
}

class TileRegisters : public testing::Test {
 protected:
  void TearDown() override { tilerelease(); }

  // Runs `multiply` on random tiles of random shapes, and compares each of the sums with
  // of(sum, a, b, steps): `a` and `b` are the operands of one sum, four bytes for each step.
  template <class Of>
  void check_products(void (*multiply)(int, int, int), Of of) {
    for (int round = 0; round < 300; ++round) {
      const auto below = [&](int n) { return static_cast<int>(random_() % n); };
      const int tokens = 1 + below(16);
      const int steps = 1 + below(16);
      const int columns = 1 + below(16);
      const Config config = product_config(tokens, steps, columns);
      ldtilecfg(&config);
      // Rows are farther apart than they are long.
      const int stride = 4 * (16 + below(3));
      std::vector<char> c(16 * stride), a(16 * stride), b(16 * stride);
      for (std::vector<char>* operand : {&c, &a, &b}) {
        fill(operand->data(), 4 * stride, random_);
      }
      tileloadd(0, c.data(), stride);
      tileloaddt1(1, a.data(), stride);
      tileloadd(2, b.data(), stride);
      multiply(0, 1, 2);
      std::vector<char> out = c;
      tilestored(0, out.data(), stride);
      for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < stride / 4; ++n) {
          const int at = m * stride / 4 + n;
          auto want = lane<uint32_t>(c.data(), at);
          if (m < tokens && n < columns) {
            char x[64], y[64];
            for (int k = 0; k < steps; ++k) {
              std::memcpy(x + 4 * k, a.data() + m * stride + 4 * k, 4);
              std::memcpy(y + 4 * k, b.data() + k * stride + 4 * n, 4);
            }
            want = of(want, x, y, steps);
          }
          const auto got = lane<uint32_t>(out.data(), at);
          const bool nan = std::isnan(std::bit_cast<float>(want)) &&
                           std::isnan(std::bit_cast<float>(got)) && multiply == tdpbf16ps;
          ASSERT_TRUE(got == want || nan)
              << "row " << m << ", column " << n << " in round " << round;
        }
      }
    }
  }

  template <class A, class B>
  void check_bytes(void (*multiply)(int, int, int)) {
    check_products(multiply, [](uint32_t sum, const char* a, const char* b, int steps) {
      int64_t total = sum;
      for (int i = 0; i < 4 * steps; ++i) total += lane<A>(a, i) * lane<B>(b, i);
      return static_cast<uint32_t>(total);
    });
  }

  Random random_{3};
};

TEST_F(TileRegisters, ProductsOfBytes) {
  check_bytes<int8_t, int8_t>(tdpbssd);
  check_bytes<int8_t, uint8_t>(tdpbsud);
  check_bytes<uint8_t, int8_t>(tdpbusd);
}

// Which of several NaNs a sum is, the manual does not say.
TEST_F(TileRegisters, ProductsOfBf16) {
  check_products(tdpbf16ps, [](uint32_t sum, const char* a, const char* b, int steps) {
    float halves[2] = {};
    for (int i = 0; i < 2 * steps; ++i) {
      halves[i % 2] = flushed_fused(widened(lane<uint16_t>(a, i)), widened(lane<uint16_t>(b, i)),
                                    halves[i % 2]);
    }
    const float product = flushed(halves[0] + halves[1]);
    return std::bit_cast<uint32_t>(flushed(flushed(std::bit_cast<float>(sum)) + product));
  });
}

TEST_F(TileRegisters, LoadsAndStoresWhatIsConfigured) {
  Config config;
  config.rows[5] = 3;
  config.row_bytes[5] = 7;
  ldtilecfg(&config);
  std::vector<char> memory(100);
  fill(memory.data(), 25, random_);
  tileloadd(5, memory.data(), 40);
  std::vector<char> out(100, 0x5a);
  tilestored(5, out.data(), 20);
  for (int i = 0; i < 100; ++i) {
    const bool stored = i / 20 < 3 && i % 20 < 7;
    EXPECT_EQ(out[i], stored ? memory[i / 20 * 40 + i % 20] : 0x5a) << i;
  }
  tilezero(5);
  tilestored(5, out.data(), 20);
  for (int i = 0; i < 7; ++i) EXPECT_EQ(out[20 + i], 0);
}

TEST_F(TileRegisters, ConfigurationOfAThread) {
  const Config config = product_config(3, 4, 5);
  ldtilecfg(&config);
  Config now;
  sttilecfg(&now);
  EXPECT_EQ(std::memcmp(&now, &config, sizeof(now)), 0);
  const Config none{.palette = 0};
  std::thread([&] {
    sttilecfg(&now);
    EXPECT_EQ(std::memcmp(&now, &none, sizeof(now)), 0);
  }).join();
  tilerelease();
  sttilecfg(&now);
  EXPECT_EQ(std::memcmp(&now, &none, sizeof(now)), 0);
}

TEST_F(TileRegisters, EndTheProcessWhereTheCpuWouldFault) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  EXPECT_DEATH(tilezero(0), "emulated tilezero: no tile configuration is loaded");
  Config config = product_config(3, 4, 5);
  ldtilecfg(&config);
  char memory[64] = {};
  EXPECT_DEATH(tileloadd(3, memory, 64), "emulated tileloadd: tile 3 is not configured");
  EXPECT_DEATH(tilestored(7, memory, 64), "emulated tilestored: tile 7 is not configured");
  EXPECT_DEATH(tdpbsud(0, 2, 1), "emulated tdpbsud: the sums have not as many rows as A");
  EXPECT_DEATH(tdpbf16ps(0, 0, 2), "emulated tdpbf16ps: the tiles are not three");
  const auto dies = [&](auto change, const char* line) {
    Config wrong = config;
    change(wrong);
    EXPECT_DEATH(ldtilecfg(&wrong), line);
  };
  dies([](Config& c) { c.palette = 2; }, "there is no such palette");
  dies([](Config& c) { c.reserved[13] = 1; }, "a reserved byte is not zero");
  dies([](Config& c) { c.rows[8] = c.row_bytes[8] = 4; }, "a reserved byte is not zero");
  dies([](Config& c) { c.rows[2] = 17; }, "a tile has more than 16 rows");
  dies([](Config& c) { c.row_bytes[2] = 68; }, "a row has more than 64 bytes");
  dies([](Config& c) { c.rows[2] = 0; }, "a tile has rows without columns");
}

}  // namespace
}  // namespace lk::emulated

#include "lk/testing/emulated/tile_registers.h"

#include <immintrin.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "lk/testing/emulated/flushed_products.h"

namespace lk::emulated {
namespace {

constexpr int kTiles = 8;
constexpr int kMostRows = 16;
constexpr int kMostBytes = 64;  // of a row

// What ldtilecfg reads.
struct Config {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Registers {
  Config config;
  alignas(64) char tiles[kTiles][kMostRows][kMostBytes];
};
thread_local Registers registers;

template <class T>
T* row(int tile, int row) {
  return reinterpret_cast<T*>(registers.tiles[tile][row]);
}
int rows(int tile) { return registers.config.rows[tile]; }
int row_bytes(int tile) { return registers.config.row_bytes[tile]; }

[[noreturn]] void fault(const char* instruction, const std::string& why) {
  std::fprintf(stderr, "emulated %s: %s\n", instruction, why.c_str());
  std::abort();
}

void check_configured(const char* instruction, int tile) {
  if (tile < 0 || tile >= kTiles) fault(instruction, "there are 8 tile registers");
  if (registers.config.palette == 0) fault(instruction, "no tile configuration is loaded");
  if (rows(tile) == 0) {
    fault(instruction, "tile " + std::to_string(tile) + " is not configured");
  }
}

// Bytes and rows beyond the configured ones are zeros.
void load(const char* instruction, int tile, const void* base, int64_t stride) {
  check_configured(instruction, tile);
  std::memset(registers.tiles[tile], 0, sizeof(registers.tiles[tile]));
  for (int i = 0; i < rows(tile); ++i) {
    std::memcpy(row<char>(tile, i), static_cast<const char*>(base) + i * stride, row_bytes(tile));
  }
}

void check_product(const char* instruction, int c, int a, int b) {
  for (int tile : {c, a, b}) check_configured(instruction, tile);
  if (c == a || c == b || a == b) fault(instruction, "the tiles are not three");
  if (rows(c) != rows(a)) fault(instruction, "the sums have not as many rows as A");
  if (row_bytes(c) != row_bytes(b)) fault(instruction, "the sums have not as many columns as B");
  if (row_bytes(a) != 4 * rows(b)) fault(instruction, "B has not as many rows as A has columns");
  if (row_bytes(c) % 4 != 0) fault(instruction, "the columns are not whole");
}

template <class A, class B>
void multiply_bytes(const char* instruction, int c, int a, int b) {
  check_product(instruction, c, a, b);
  for (int m = 0; m < rows(c); ++m) {
    for (int k = 0; k < rows(b); ++k) {
      for (int n = 0; n < row_bytes(c) / 4; ++n) {
        uint32_t sum = row<uint32_t>(c, m)[n];  // wraps around
        for (int i = 0; i < 4; ++i) {
          sum += static_cast<uint32_t>(row<A>(a, m)[4 * k + i] * row<B>(b, k)[4 * n + i]);
        }
        row<uint32_t>(c, m)[n] = sum;
      }
    }
  }
}

}  // namespace

void ldtilecfg(const void* config) {
  Config next;
  std::memcpy(&next, config, sizeof(next));
  if (next.palette > 1) fault("ldtilecfg", "there is no such palette");
  if (next.palette == 0) return tilerelease();
  for (uint8_t byte : next.reserved) {
    if (byte != 0) fault("ldtilecfg", "a reserved byte is not zero");
  }
  for (int i = 0; i < 16; ++i) {
    if (i >= kTiles && (next.row_bytes[i] != 0 || next.rows[i] != 0)) {
      fault("ldtilecfg", "a reserved byte is not zero");
    }
    if (next.row_bytes[i] > kMostBytes) fault("ldtilecfg", "a row has more than 64 bytes");
    if (next.rows[i] > kMostRows) fault("ldtilecfg", "a tile has more than 16 rows");
    if ((next.rows[i] == 0) != (next.row_bytes[i] == 0)) {
      fault("ldtilecfg", "a tile has rows without columns or columns without rows");
    }
  }
  registers = {};
  registers.config = next;
}

void sttilecfg(void* config) { std::memcpy(config, &registers.config, sizeof(Config)); }

void tilerelease() { registers = {}; }

void tileloadd(int tile, const void* base, int64_t stride) {
  load("tileloadd", tile, base, stride);
}
void tileloaddt1(int tile, const void* base, int64_t stride) {
  load("tileloaddt1", tile, base, stride);
}

void tilestored(int tile, void* base, int64_t stride) {
  check_configured("tilestored", tile);
  for (int i = 0; i < rows(tile); ++i) {
    std::memcpy(static_cast<char*>(base) + i * stride, row<char>(tile, i), row_bytes(tile));
  }
}

void tilezero(int tile) {
  check_configured("tilezero", tile);
  std::memset(registers.tiles[tile], 0, sizeof(registers.tiles[tile]));
}

void tdpbssd(int c, int a, int b) { multiply_bytes<int8_t, int8_t>("tdpbssd", c, a, b); }
void tdpbsud(int c, int a, int b) { multiply_bytes<int8_t, uint8_t>("tdpbsud", c, a, b); }
void tdpbusd(int c, int a, int b) { multiply_bytes<uint8_t, int8_t>("tdpbusd", c, a, b); }

// The products of even and of odd bf16 are added up apart, from zero, over the whole tile. Their
// sums are added to each other, and what that gives to c. The columns that c lacks are zeros in B.
void tdpbf16ps(int c, int a, int b) {
  check_product("tdpbf16ps", c, a, b);
  const unsigned before = flush_denormals();
  for (int m = 0; m < rows(c); ++m) {
    for (int half = 0; half < 2; ++half) {
      __m256 even = _mm256_setzero_ps();
      __m256 odd = _mm256_setzero_ps();
      for (int k = 0; k < rows(b); ++k) {
        const __m256i x = _mm256_set1_epi32(row<int32_t>(a, m)[k]);
        const __m256i y = row<__m256i>(b, k)[half];
        add_product(even, even_bf16(x), even_bf16(y));
        add_product(odd, odd_bf16(x), odd_bf16(y));
      }
      __m256& sum = row<__m256>(c, m)[half];
      sum = flushed_sum(sum, flushed_sum(even, odd));
    }
  }
  // NaNs in A make NaNs of the missing columns, which the instruction sets to zero.
  for (int m = 0; m < rows(c); ++m) {
    std::memset(row<char>(c, m) + row_bytes(c), 0, kMostBytes - row_bytes(c));
  }
  _mm_setcsr(before);
}

}  // namespace lk::emulated

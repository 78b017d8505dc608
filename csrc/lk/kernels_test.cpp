// Compares the kernels of every instruction set with the same arithmetic in double precision.
#include "lk/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <vector>

#if defined(LK_EMULATE)
#include "lk/testing/emulated/tile_registers.h"
#endif
#include "lk/testing/reference_values.h"
#include "lk/tiles.h"

namespace lk {
namespace {

using namespace test_values;

TEST(Conversions, Bf16RoundsToNearestEven) {
  EXPECT_EQ(float_to_bf16(1.0f), 0x3f80);
  EXPECT_EQ(float_to_bf16(float_of(0x3f808000)), 0x3f80);  // a tie goes to the even neighbour
  EXPECT_EQ(float_to_bf16(float_of(0x3f818000)), 0x3f82);
  EXPECT_EQ(float_to_bf16(float_of(0x3f818001)), 0x3f82);
  EXPECT_EQ(float_to_bf16(float_of(0x3f808001)), 0x3f81);
  EXPECT_EQ(float_to_bf16(INFINITY), 0x7f80);
  EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(float_of(0x7f800001)))));
}

// All numbers of fp16, and the numbers half-way between neighbours.
TEST(Conversions, Fp16ThereAndBack) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = fp16_to_float(half);
    if ((half & 0x7c00) == 0x7c00) {
      const bool nan = (half & 1023) != 0;
      EXPECT_TRUE(nan ? std::isnan(value) : std::isinf(value));
      EXPECT_EQ(std::isnan(fp16_to_float(float_to_fp16(value))), nan);
      continue;
    }
    EXPECT_EQ(value, static_cast<float>(small_float(half, 5, 10, 15)));
    EXPECT_EQ(float_to_fp16(value), half);
    if (half < 0x7bff) {
      const float middle = (value + fp16_to_float(static_cast<uint16_t>(half + 1))) / 2;
      EXPECT_EQ(float_to_fp16(middle), half + (half & 1)) << bits;
    }
  }
  EXPECT_EQ(float_to_fp16(65520.0f), 0x7c00);
  EXPECT_EQ(float_to_fp16(1e30f), 0x7c00);
  EXPECT_EQ(float_to_fp16(-1e-30f), 0x8000);
}

// The group scales of a product. kWholeRow is one group, as long as a padded row.
struct Scales {
  ScaleType type = ScaleType::kNone;
  int64_t group = 0;
};
constexpr int64_t kWholeRow = -1;

std::vector<Scales> scales_of(Format format) {
  std::vector<Scales> all;
  if (format == Format::kFp4 || format == Format::kFp4Act8)
    return {{ScaleType::kE8m0, 32}, {ScaleType::kE4m3, 16}};
  if (!has_zero_points(format)) all.push_back({});
  if (format == Format::kFp8) all.push_back({ScaleType::kFloatBlocks, 128});
  if (has_groups(format)) {
    for (int64_t group : {int64_t{32}, int64_t{64}, int64_t{128}, kWholeRow}) {
      for (ScaleType type : {ScaleType::kBf16, ScaleType::kFp16, ScaleType::kFloat}) {
        all.push_back({type, group});
      }
    }
  }
  return all;
}

// Activations as an arithmetic rounds them: as float, bf16, or in blocks of integers.
std::vector<double> rounded(const std::string& arithmetic, size_t block,
                            const std::vector<float>& x) {
  std::vector<double> values(x.begin(), x.end());
  if (arithmetic.starts_with("int")) {
    const float most = arithmetic == "int16" ? 32767 : 127;
    for (size_t begin = 0; begin < x.size(); begin += block) {
      const size_t end = std::min(begin + block, x.size());
      float largest = 0;
      for (size_t i = begin; i < end; ++i) largest = std::max(largest, std::abs(x[i]));
      const float inverse = largest > 0 ? most / largest : 0;
      for (size_t i = begin; i < end; ++i) {
        values[i] = double{largest / most} * std::nearbyint(x[i] * inverse);
      }
    }
  } else if (arithmetic.starts_with("bf16")) {
    for (double& value : values) value = bf16_to_float(float_to_bf16(static_cast<float>(value)));
  }
  return values;
}

// A random size of blocks of activations, of at most 2^most, that divides the group size.
int random_block_log2(int64_t group, int most, Random& random) {
  int widest = kLeastActBlockLog2;
  while (widest < most && group % (int64_t{2} << widest) == 0) ++widest;
  return widest - static_cast<int>(random_below(random, widest - kLeastActBlockLog2 + 1));
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// A tile of weights with its scales, and some tokens, each in memory of exactly the needed size, so
// that the sanitizers notice a read behind it.
class Product {
 public:
  Product(const Kernels& kernels, Format format, int64_t rows, int64_t k, int64_t tokens,
          Scales scales, int64_t block_end, Random& random)
      : kernels_(kernels),
        format_(format),
        rows_(rows),
        k_(k),
        scale_type_(scales.type),
        group_(scales.group == kWholeRow ? (k + 31) / 32 * 32 : scales.group),
        block_log2_(random_block_log2(group_, kernels.of(format).most_block_log2, random)),
        block_end_(block_end) {
    const int64_t groups = group_ == 0 ? 0 : (k + group_ - 1) / group_;
    const bool blocks = scales.type == ScaleType::kFloatBlocks;
    weights = random_weights(format, rows, k, random);
    scale_ = random_scales(scales.type, blocks ? groups : rows * groups, random);
    if (blocks) next_scale_ = random_scales(scales.type, groups, random);
    if (has_zero_points(format)) {
      for (int64_t i = 0; i < rows * groups; ++i) zero_.push_back(random_below(random, 16));
    }
    for (int64_t t = 0; t < tokens; ++t) set_token(t, random_floats(k, random));
    order();
  }

  void set_token(int64_t token, const std::vector<float>& x) {
    const int64_t count = std::max<int64_t>(token + 1, acts_.size());
    acts_.resize(count);
    x_.resize(count);
    x_[token] = x;
    // All bits are ones, which is NaN as float and as bf16, so that what is not written is noticed.
    acts_[token].assign(format().act_row_bytes(k_), -1);
    format().pack(x.data(), k_, 0, k_, block_log2_, acts_[token].data());
  }

  // Must be called after row-major `weights` have changed.
  void order() {
    tile_ = weights;
    turn(tile_.data(), row_bytes(format_, k_), kUnitBytes);
    if (group_ == 0) return;
    const int64_t groups = (k_ + group_ - 1) / group_;
    ordered_scale_ = scale_;
    ordered_zero_ = zero_;
    if (scale_type_ != ScaleType::kFloatBlocks) {
      turn(ordered_scale_.data(), groups * bytes_of(scale_type_), bytes_of(scale_type_));
    }
    if (!zero_.empty()) turn(reinterpret_cast<char*>(ordered_zero_.data()), groups, 1);
  }

  // [tokens][kTileRows], NaN where nothing was written.
  std::vector<float> run(int64_t token, int64_t tokens) const {
    std::vector<const void*> acts;
    for (int64_t t = 0; t < tokens; ++t) acts.push_back(acts_[token + t].data());
    std::vector<char> gathered;
    if (format().gathers(tokens)) {
      // As above; and the kernels do not write beyond its end.
      gathered.assign(format().gathered_bytes(k_, tokens) + 64, -1);
      format().gather(acts.data(), tokens, k_, gathered.data());
      EXPECT_EQ(std::count(gathered.end() - 64, gathered.end(), -1), 64);
    }
    std::vector<float> out((tokens + kOutPadding) * kTileRows, NAN);
    const std::unique_ptr<char, Free> scratch(
        static_cast<char*>(std::aligned_alloc(64, kScratchBytes)));
    std::memset(scratch.get(), -1, kScratchBytes);
    MatmulArgs args;
    args.tile = tile_.data();
    args.next = tokens % 2 ? tile_.data() : nullptr;
    args.rows = rows_;
    args.k = k_;
    args.row_bytes = row_bytes(format_, k_);
    args.scale_type = scale_type_;
    args.group = group_;
    if (scale_type_ == ScaleType::kFloatBlocks) {
      args.scale = scale_.data();
      args.next_block_scale = reinterpret_cast<const float*>(next_scale_.data());
      args.block_end = block_end_;
    } else if (group_ != 0) {
      args.scale = ordered_scale_.data();
      if (!zero_.empty()) args.zero = ordered_zero_.data();
    }
    args.act_block_log2 = block_log2_;
    args.acts = acts.data();
    args.gathered = gathered.data();
    args.tokens = tokens;
    args.out = out.data();
    args.scratch = scratch.get();
    format().matmul(args);
#if defined(LK_EMULATE)
    // The thread is left without tiles, which the system would have to save.
    char config[64];
    emulated::sttilecfg(config);
    EXPECT_EQ(std::count(config, config + sizeof(config), 0), 64);
#endif
    out.resize(tokens * kTileRows);
    return out;
  }

  // The sums of all rows in double precision, and the sums of their terms' magnitudes; both are
  // [tokens][rows].
  void reference(std::vector<double>* sums, std::vector<double>* sizes) const {
    const int64_t tokens = x_.size();
    sums->assign(tokens * rows_, 0.0);
    sizes->assign(tokens * rows_, 0.0);
    std::vector<double> w(k_ * rows_);  // [k][row]
    std::vector<double> off(zero_.empty() ? 0 : w.size());
    const int64_t groups = group_ == 0 ? 0 : (k_ + group_ - 1) / group_;
    for (int64_t r = 0; r < rows_; ++r) {
      const char* row = weights.data() + r * row_bytes(format_, k_);
      for (int64_t i = 0; i < k_; ++i) {
        const int64_t group = group_ == 0 ? 0 : i / group_;
        double scale = 1;
        if (scale_type_ == ScaleType::kFloatBlocks) {
          scale = element<float>((r < block_end_ ? scale_ : next_scale_).data(), group);
        } else if (group_ != 0) {
          scale = scale_value(scale_type_, scale_.data(), r * groups + group);
        }
        w[i * rows_ + r] = scale * code_value(format_, get_code(format_, row, i));
        if (!zero_.empty()) off[i * rows_ + r] = scale * (zero_[r * groups + group] - 8);
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const std::vector<double> x = rounded(format().arithmetic, size_t{1} << block_log2_, x_[t]);
      double* sum = sums->data() + t * rows_;
      double* size = sizes->data() + t * rows_;
      for (int64_t i = 0; i < k_; ++i) {
        const double* weight = w.data() + i * rows_;
        for (int64_t r = 0; r < rows_; ++r) {
          const double term = weight[r] * x[i];
          sum[r] += term;
          size[r] += std::abs(term);
        }
        for (int64_t r = 0; r < rows_ && !off.empty(); ++r) {
          const double term = off[i * rows_ + r] * x[i];
          sum[r] -= term;
          size[r] += std::abs(term);
        }
      }
    }
  }

  std::vector<char> weights;  // row-major

 private:
  const FormatKernels& format() const { return kernels_.of(format_); }
  void turn(char* rows, int64_t bytes, int64_t unit) const {
    std::vector<char> buffer(rows_ * bytes);
    tile_in_place(rows, rows_, bytes, unit, buffer.data());
  }

  const Kernels& kernels_;
  const Format format_;
  const int64_t rows_;
  const int64_t k_;
  const ScaleType scale_type_;
  const int64_t group_;
  const int block_log2_;  // of activations
  const int64_t block_end_;
  std::vector<char> tile_, scale_, next_scale_, ordered_scale_;
  std::vector<uint8_t> zero_, ordered_zero_;
  std::vector<std::vector<float>> x_;
  std::vector<std::vector<char>> acts_;
};

using Case = std::tuple<std::string, Format>;

std::string case_name(const testing::TestParamInfo<Case>& info) {
  return std::get<0>(info.param) + "_" + name_of(std::get<1>(info.param));
}

class Matmul : public testing::TestWithParam<Case> {
 protected:
  const Kernels& kernels() const { return kernels_named(std::get<0>(GetParam())); }
  Format format() const { return std::get<1>(GetParam()); }

  // Compares a product with the reference, and checks that a token alone gives the same bits.
  void check(int64_t rows, int64_t k, int64_t tokens, Scales scales, int64_t block_end) {
    SCOPED_TRACE(testing::Message() << "k " << k << ", rows " << rows << ", tokens " << tokens
                                    << ", scales " << static_cast<int>(scales.type) << " per "
                                    << scales.group << ", block end " << block_end);
    const Product product(kernels(), format(), rows, k, tokens, scales, block_end, random_);
    const std::vector<float> out = product.run(0, tokens);
    std::vector<double> want, size;
    product.reference(&want, &size);
    int wrong = 0;
    for (int64_t t = 0; t < tokens && wrong < 3; ++t) {
      for (int64_t r = 0; r < rows && wrong < 3; ++r) {
        const int64_t at = t * rows + r;
        const float got = out[t * kTileRows + r];
        if (!(std::abs(got - want[at]) <= 1e-5 * size[at] + 1e-30)) {
          ADD_FAILURE() << "token " << t << ", row " << r << " is " << got << ", not " << want[at];
          ++wrong;
        }
      }
    }
    for (int64_t t : {int64_t{0}, tokens / 2, tokens - 1}) {
      const std::vector<float> alone = product.run(t, 1);
      EXPECT_EQ(std::memcmp(out.data() + t * kTileRows, alone.data(), rows * sizeof(float)), 0)
          << "token " << t << " alone has other bits";
    }
  }

  Random random_{1};
};

// Sizes of K that are no whole units or blocks, tiles of fewer rows, and every division of tokens
// into passes. The lengths of the lists have no common divisor, so each size of one list is
// combined with each of another.
TEST_P(Matmul, Sizes) {
  constexpr int64_t kSizes[] = {1, 2, 3, 7, 31, 32, 33, 64, 100, 258, 2047};
  constexpr int64_t kRows[] = {64, 32, 45, 61, 13, 1, 47, 64};
  constexpr int64_t kTokens[] = {1, 2, 3, 4, 5, 6, 7, 11, 16, 19, 24, 40, 200};
  constexpr int64_t kBlockEnds[] = {kTileRows, 28, 1, 40, 63};
  const std::vector<Scales> scales = scales_of(format());
  for (int64_t i = 0; i < 11 * 13; ++i) {
    const bool even = code_bits(format()) == 4;
    const int64_t k = kSizes[i % 11];
    check(kRows[i % 8], even ? (k + 1) / 2 * 2 : k, kTokens[i % 13],
          scales[(i + i / 13) % scales.size()], kBlockEnds[i % 5]);
    if (HasFailure()) return;
  }
}

TEST_P(Matmul, AnyNumberOfRows) {
  const std::vector<Scales> scales = scales_of(format());
  for (int64_t rows = 1; rows <= kTileRows; ++rows) {
    check(rows, 46, rows % 2 ? 17 : 3, scales[rows % scales.size()], rows / 2 + 1);
    if (HasFailure()) return;
  }
}

// A token has the same bits alone and in batches of every size.
TEST_P(Matmul, EveryBatchSize) {
  constexpr int64_t kTokens = 50;
  for (const Scales& scales : scales_of(format())) {
    const int64_t k = unit_weights(format()) * 35;
    const Product product(kernels(), format(), 50, k, kTokens, scales, 20, random_);
    std::vector<float> alone;
    for (int64_t t = 0; t < kTokens; ++t) {
      const std::vector<float> out = product.run(t, 1);
      alone.insert(alone.end(), out.begin(), out.begin() + 50);
    }
    for (int64_t tokens = 1; tokens <= kTokens; ++tokens) {
      const std::vector<float> out = product.run(kTokens - tokens, tokens);
      for (int64_t t = 0; t < tokens; ++t) {
        ASSERT_EQ(std::memcmp(out.data() + t * kTileRows,
                              alone.data() + (kTokens - tokens + t) * 50, 50 * sizeof(float)),
                  0)
            << "token " << t << " of " << tokens;
      }
    }
  }
}

// Every code, at each place in a unit.
TEST_P(Matmul, Codes) {
  const int64_t k = unit_weights(format());
  const Scales scales = has_zero_points(format()) ? Scales{ScaleType::kFloat, 32} : Scales{};
  Product product(kernels(), format(), kTileRows, k, 0, scales, kTileRows, random_);
  product.set_token(0, std::vector<float>(k, 1.0f));
  // fill() gives the product of weights that all have one code. With zero points, those of values 0
  // and 1 give the offset and the factor of the group scale and the zero point.
  const auto fill = [&](uint32_t code) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      for (int64_t i = 0; i < k; ++i) {
        set_code(format(), product.weights.data() + r * row_bytes(format(), k), i, code);
      }
    }
    product.order();
    return product.run(0, 1);
  };
  std::vector<float> base(kTileRows, 0.0f);
  std::vector<float> slope(kTileRows, 1.0f);
  const uint32_t zero = is_int4(format()) ? 8 : 0;
  if (has_zero_points(format())) {
    base = fill(zero);
    slope = fill(zero + 1);
    for (int64_t r = 0; r < kTileRows; ++r) slope[r] = (slope[r] - base[r]) / k;
  }
  fill(zero);
  for (int64_t place = 0; place < k; ++place) {
    for (uint32_t first = 0; first < 1u << code_bits(format()); first += kTileRows) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        set_code(format(), product.weights.data() + r * row_bytes(format(), k), place,
                 (first + r) & ((1u << code_bits(format())) - 1));
      }
      product.order();
      const std::vector<float> out = product.run(0, 1);
      for (int64_t r = 0; r < kTileRows; ++r) {
        const uint32_t code = (first + r) & ((1u << code_bits(format())) - 1);
        const double want = code_value(format(), code);
        const float got = out[r];
        // fp8's NaN are marked in the scales (nan_weights.h).
        if (format() == Format::kFp8 && std::isnan(want)) continue;
        // vdpbf16ps treats subnormal numbers as zeros.
        if (format() == Format::kBf16 && std::abs(want) < 0x1p-126 && got == 0) continue;
        const double bound = 1e-5 * std::abs(want) + (zero == 8 ? 1e-4 : 0);
        const bool right = std::isnan(want)   ? std::isnan(got)
                           : std::isinf(want) ? got == want
                                              : std::abs(base[r] + slope[r] * want - got) <= bound;
        ASSERT_TRUE(right) << "code " << code << " at " << place << " is " << got << ", not "
                           << want;
      }
    }
    for (int64_t r = 0; r < kTileRows; ++r) {
      set_code(format(), product.weights.data() + r * row_bytes(format(), k), place, zero);
    }
  }
}

// The activations of the intermediate are packed tile by tile.
TEST_P(Matmul, PackInPieces) {
  const FormatKernels& kernel = kernels().of(format());
  for (int64_t k : {1, 31, 32, 77, 300}) {
    const std::vector<float> x = random_floats(k, random_);
    const bool integers = std::string(kernel.arithmetic).starts_with("int");
    for (int log2 = integers ? kLeastActBlockLog2 : kActBlockLog2; log2 <= kernel.most_block_log2;
         ++log2) {
      // Nobody writes the bytes that pad a row to cache lines.
      std::vector<char> at_once(kernel.act_row_bytes(k), 0);
      std::vector<char> in_pieces = at_once;
      kernel.pack(x.data(), k, 0, k, log2, at_once.data());
      for (int64_t piece : {1 << log2, 1 << kMostActBlockLog2}) {
        for (int64_t at = 0; at < k; at += piece) {
          const int64_t n = std::min(piece, k - at);
          const std::vector<float> part(x.begin() + at, x.begin() + at + n);  // ends where it must
          kernel.pack(part.data(), n, at, k, log2, in_pieces.data());
        }
        EXPECT_EQ(in_pieces, at_once) << k << " in pieces of " << piece;
      }
    }
  }
}

// If one activation is NaN or infinity, the sums of all rows are not finite.
TEST_P(Matmul, NonFiniteActivations) {
  const Scales scales = scales_of(format()).back();
  for (int64_t tokens : {1, 20}) {
    for (float bad : {INFINITY, -INFINITY, NAN}) {
      Product product(kernels(), format(), kTileRows, 70, tokens, scales, kTileRows, random_);
      std::vector<float> x = random_floats(70, random_);
      x[68] = bad;
      product.set_token(0, x);
      const std::vector<float> out = product.run(0, tokens);
      for (int64_t r = 0; r < kTileRows; ++r) EXPECT_FALSE(std::isfinite(out[r])) << bad;
      for (int64_t i = kTileRows; i < tokens * kTileRows; ++i) EXPECT_TRUE(std::isfinite(out[i]));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Matmul,
                         testing::Combine(testing::ValuesIn(available_kernels()),
                                          testing::ValuesIn(kAllFormats)),
                         case_name);

// Sums of bytes are exact until they are scaled, and all instruction sets that quantise activations
// in the same blocks scale them alike.
TEST(BytesTimesBytes, SameBitsOnAllInstructionSets) {
  const Kernels& last = kernels_named(available_kernels().back());
  for (Format format : kAllFormats) {
    if (!std::string(last.of(format).arithmetic).starts_with("int8")) continue;
    for (const std::string& isa : available_kernels()) {
      const FormatKernels& kernel = kernels_named(isa).of(format);
      if (!std::string(kernel.arithmetic).starts_with("int8") ||
          kernel.most_block_log2 != last.of(format).most_block_log2) {
        continue;
      }
      for (const Scales& scales : scales_of(format)) {
        Random one(11);
        Random same(11);
        const Product product(kernels_named(isa), format, 61, 200, 40, scales, 20, one);
        const Product of_last(last, format, 61, 200, 40, scales, 20, same);
        for (int64_t tokens : {1, 5, 6, 40}) {
          const std::vector<float> out = product.run(0, tokens);
          const std::vector<float> want = of_last.run(0, tokens);
          for (int64_t t = 0; t < tokens; ++t) {
            EXPECT_EQ(std::memcmp(out.data() + t * kTileRows, want.data() + t * kTileRows,
                                  61 * sizeof(float)),
                      0)
                << name_of(format) << " on " << isa << ", token " << t << " of " << tokens;
          }
        }
      }
    }
  }
}

class Rows : public testing::TestWithParam<std::string> {
 protected:
  const Kernels& kernels() const { return kernels_named(GetParam()); }
  Random random_{2};
};

// Every code of an 8-bit group scale.
TEST_P(Rows, ScaleCodes) {
  for (const auto& [type, group] : scales_of(Format::kFp4)) {
    const int block_log2 = group == 16 ? kLeastActBlockLog2 : kActBlockLog2;
    for (uint32_t first = 0; first < 256; first += kTileRows) {
      std::vector<uint8_t> scale(kTileRows), weights(kTileRows * 4);
      for (uint32_t r = 0; r < kTileRows; ++r) {
        scale[r] = static_cast<uint8_t>(first + r);
        weights[r * 4] = 2;  // 1.0
      }
      const FormatKernels& kernel = kernels().of(Format::kFp4);
      // A value that the arithmetic does not round: integers are multiples of a 32767th.
      const float value = std::string(kernel.arithmetic) == "int16" ? 32767 : 1;
      const std::vector<float> x = {value, 0, 0, 0, 0, 0, 0, 0};
      std::vector<char> row(kernel.act_row_bytes(8));
      kernel.pack(x.data(), 8, 0, 8, block_log2, row.data());
      const void* acts = row.data();
      std::vector<char> gathered;
      if (kernel.gathers(1)) {
        gathered.resize(kernel.gathered_bytes(8, 1));
        kernel.gather(&acts, 1, 8, gathered.data());
      }
      std::vector<float> out((1 + kOutPadding) * kTileRows);
      alignas(64) char scratch[kScratchBytes];
      MatmulArgs args;
      args.tile = reinterpret_cast<const char*>(weights.data());
      args.rows = kTileRows;
      args.k = 8;
      args.row_bytes = 4;
      args.scale_type = type;
      args.scale = scale.data();
      args.group = group;
      args.acts = &acts;
      args.gathered = gathered.data();
      args.act_block_log2 = block_log2;
      args.tokens = 1;
      args.out = out.data();
      args.scratch = scratch;
      kernel.matmul(args);
      for (int64_t r = 0; r < kTileRows; ++r) {
        const auto want = static_cast<float>(scale_value(type, scale.data(), r) * value);
        if (std::isnan(want)) {
          EXPECT_TRUE(std::isnan(out[r])) << int{scale[r]};
        } else {
          EXPECT_EQ(out[r], want) << int{scale[r]};
        }
      }
    }
  }
}

TEST_P(Rows, Widen) {
  for (int64_t n : {1, 7, 16, 31, 256, 300}) {
    std::vector<uint16_t> x(n);
    std::vector<float> values(n);
    for (uint16_t& value : x) value = float_to_bf16(random_normal(random_));
    kernels().widen(x.data(), Scalar::kBf16, n, values.data());
    for (int64_t i = 0; i < n; ++i) EXPECT_EQ(values[i], bf16_to_float(x[i]));
    for (uint16_t& value : x) value = float_to_fp16(random_normal(random_));
    kernels().widen(x.data(), Scalar::kFp16, n, values.data());
    for (int64_t i = 0; i < n; ++i) EXPECT_EQ(values[i], fp16_to_float(x[i]));
  }
}

TEST_P(Rows, Finish) {
  for (int64_t n : {1, 13, 64}) {
    const std::vector<float> in = random_floats(n, random_);
    const std::vector<float> row_scale = random_floats(n, random_);
    const std::vector<float> bias = random_floats(n, random_);
    for (int options = 0; options < 8; ++options) {
      Epilogue epilogue;
      if (options & 1) epilogue.row_scale = row_scale.data();
      if (options & 2) epilogue.bias = bias.data();
      if (options & 4) epilogue.scale = 0.37f;
      std::vector<float> out(n, NAN);
      alignas(64) float streamed[64];
      kernels().finish({in.data(), epilogue}, n, false, out.data());
      kernels().finish({in.data(), epilogue}, n, true, streamed);
      EXPECT_EQ(std::vector<float>(streamed, streamed + n), out);
      for (int64_t i = 0; i < n; ++i) {
        const double product = double{in[i]} * (options & 1 ? row_scale[i] : 1.0f) * epilogue.scale;
        const double want = product + (options & 2 ? bias[i] : 0.0f);
        EXPECT_NEAR(out[i], want, 3e-7 * (std::abs(product) + std::abs(want))) << options;
      }
    }
  }
}

TEST_P(Rows, Activate) {
  std::vector<float> gate, up;
  for (float x = -100; x < 100; x += 0.0137f) gate.push_back(x);
  for (float x : {-1e30f, -0.0f, 0.0f, 1e-30f, 1e30f}) gate.push_back(x);
  for (size_t i = 0; i < gate.size(); ++i) up.push_back(4 * random_normal(random_));
  const auto n = static_cast<int64_t>(gate.size());
  for (const ActivationSpec& spec :
       {ActivationSpec{Activation::kSilu}, ActivationSpec{Activation::kGelu},
        ActivationSpec{Activation::kGeluTanh}, ActivationSpec{Activation::kSwigluOai},
        ActivationSpec{Activation::kSwigluOai, 1.0f, 3.5f, 0.0f},
        ActivationSpec{Activation::kSwigluStep, 1.0f, 3.5f}, ActivationSpec{Activation::kRelu2}}) {
    std::vector<float> out(n, NAN);
    const bool gated = has_gate(spec.kind);
    kernels().activate(spec, {gated ? gate.data() : nullptr, {}}, {up.data(), {}}, n, out.data());
    for (int64_t i = 0; i < n; ++i) {
      const double want = activated(spec, gate[i], up[i]);
      // The bound is relative, plus an absolute part for 1 - erf and for exp, which ends at e^-87.
      const double bound = 3e-6 * std::abs(want) +
                           1e-6 * std::min(1.0, std::abs(double{gate[i]})) * (std::abs(up[i]) + 1);
      EXPECT_NEAR(out[i], want, bound) << static_cast<int>(spec.kind) << " of " << gate[i];
    }
  }
}

TEST_P(Rows, Combine) {
  constexpr int64_t kStride = 700;
  const std::vector<float> rows = random_floats(3 * kStride, random_);
  const float weights[3] = {0.5f, 2.0f, -1.0f};
  const int32_t ids[3] = {4, -1, 0};
  for (int64_t n : {1, 255, 256, 600}) {
    for (Scalar type : {Scalar::kBf16, Scalar::kFp16}) {
      std::vector<uint16_t> out(n);
      EXPECT_TRUE(kernels().combine(rows.data(), kStride, weights, ids, 3, n, type, out.data()));
      for (int64_t i = 0; i < n; ++i) {
        const float want = 0.5f * rows[i] - rows[2 * kStride + i];
        const bool bf16 = type == Scalar::kBf16;
        EXPECT_NEAR(bf16 ? bf16_to_float(out[i]) : fp16_to_float(out[i]), want,
                    std::abs(want) / (bf16 ? 256 : 2048) + 1e-6);
      }
      EXPECT_TRUE(kernels().combine(nullptr, kStride, weights, ids, 0, n, type, out.data()));
      EXPECT_EQ(out, std::vector<uint16_t>(n, 0));
    }
  }
}

TEST_P(Rows, CombineSaysWhatIsNotFinite) {
  constexpr int64_t kStride = 700;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<float> rows = random_floats(2 * kStride, random_);
  const float weights[2] = {1.0f, 1.0f};
  for (Scalar type : {Scalar::kBf16, Scalar::kFp16}) {
    // The largest float that is rounded to a finite number, and the next float.
    const float largest = type == Scalar::kBf16 ? 0x1.fefffep127f : 0x1.ffdffep15f;
    const float beyond = std::nextafter(largest, kInfinity);
    for (int64_t n : {1, 31, 256, 600}) {
      std::vector<uint16_t> out(n);
      const auto finite = [&](int64_t at, float value, int32_t second) {
        std::vector<float> changed = rows;
        changed[kStride + at] = value;
        changed[at] = 0.0f;
        const int32_t ids[2] = {0, second};
        return kernels().combine(changed.data(), kStride, weights, ids, 2, n, type, out.data());
      };
      for (int64_t at : {int64_t{0}, n / 2, n - 1}) {
        for (float value :
             {std::nanf(""), -std::nanf(""), kInfinity, -kInfinity, beyond, -beyond}) {
          EXPECT_FALSE(finite(at, value, 1)) << value << " at " << at << " of " << n;
          EXPECT_TRUE(finite(at, value, -1)) << "skipped";
        }
        EXPECT_TRUE(finite(at, largest, 1) && finite(at, -largest, 1)) << at << " of " << n;
      }
      // What is behind the row does not count.
      EXPECT_TRUE(finite(n, kInfinity, 1));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Rows, testing::ValuesIn(available_kernels()),
                         [](const auto& info) { return info.param; });

TEST(KernelsNamed, NamesWhatThisCpuRuns) {
  for (const std::string& isa : available_kernels()) {
    const Kernels& kernels = kernels_named(isa);
    EXPECT_EQ(kernels.isa, isa);
    for (const FormatKernels& format : kernels.formats) EXPECT_EQ(format.isa, isa);
  }
  EXPECT_EQ(available_kernels().front(), "portable");
  try {
    kernels_named("sse9");
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("\"sse9\", must be one of"), std::string::npos);
  }
}

}  // namespace
}  // namespace lk

#include "lk/choice.h"

#include <gtest/gtest.h>

#include <map>
#include <string>

namespace lk {
namespace {

// Two instruction sets' kernels, of which only what the choice looks at is filled in.
int64_t first_float() { return 1; }
int64_t second_float() { return 2; }
int64_t second_pairs() { return 3; }

Kernels made_up(const char* isa, const char* arithmetic, int64_t (*multiply)()) {
  Kernels kernels{};
  kernels.isa = isa;
  for (FormatKernels& format : kernels.formats) {
    format.isa = isa;
    format.arithmetic = arithmetic;
    format.multiply_in_registers = multiply;
  }
  return kernels;
}

class Chosen : public testing::Test {
 protected:
  Choice choice(double float_rate, double pair_rate) {
    FormatKernels& fp16 = newer_.formats[static_cast<int>(Format::kFp16)];
    fp16.arithmetic = "float";
    fp16.multiply_in_registers = second_float;
    return choose({&older_, &newer_}, [&](const FormatKernels& format) {
      ++calls_;
      return format.multiply_in_registers == second_pairs ? pair_rate : float_rate;
    });
  }

  Kernels older_ = made_up("older", "float", first_float);
  Kernels newer_ = made_up("newer", "bf16", second_pairs);
  int calls_ = 0;
};

TEST_F(Chosen, TheNewerKernelsWhereTheyAreAsFast) {
  for (const double pairs : {1.0, 0.75, 2.0}) {
    const Choice choice = this->choice(1.0, pairs);
    for (const FormatKernels& format : choice.kernels.formats) EXPECT_STREQ(format.isa, "newer");
  }
}

TEST_F(Chosen, TheFasterArithmeticOfEachFormat) {
  const Choice choice = this->choice(1.0, 0.5);
  EXPECT_STREQ(choice.kernels.isa, "newer");
  EXPECT_STREQ(choice.kernels.of(Format::kBf16).isa, "older");
  EXPECT_STREQ(choice.kernels.of(Format::kBf16).arithmetic, "float");
  // Where the arithmetic is the same, nothing is gained by older instructions.
  EXPECT_STREQ(choice.kernels.of(Format::kFp16).isa, "newer");
}

TEST_F(Chosen, MeasuresEachArithmeticOnce) {
  const Choice choice = this->choice(1.0, 0.5);
  EXPECT_EQ(calls_, 3);
  ASSERT_EQ(choice.rates.size(), 3u);
  EXPECT_STREQ(choice.rates[0].arithmetic, "float");
  EXPECT_EQ(choice.rates[0].weights, 1.0);
  EXPECT_STREQ(choice.rates[1].isa, "newer");
}

TEST_F(Chosen, KnowsTheRateOfAFunctionByEachNameThatItHas) {
  older_.formats[static_cast<int>(Format::kFp16)].multiply_in_registers = second_float;
  const Choice choice = this->choice(1.0, 2.0);
  EXPECT_EQ(calls_, 3);
  std::map<std::string, double> floats;
  for (const Rate& rate : choice.rates) {
    if (std::string(rate.arithmetic) == "float") floats[rate.isa] = rate.weights;
  }
  EXPECT_EQ(floats, (std::map<std::string, double>{{"newer", 1}, {"older", 1}}));
}

TEST(FastestKernels, AreThoseOfThisCpu) {
  const Choice& choice = fastest_kernels();
  EXPECT_EQ(choice.kernels.isa, available_kernels().back());
  EXPECT_EQ(&choose_kernels(""), &choice.kernels);
  for (const Rate& rate : choice.rates) EXPECT_GT(rate.weights, 0);
  for (const std::string& isa : available_kernels()) {
    EXPECT_EQ(&choose_kernels(isa), &kernels_named(isa));
  }
}

// Every arithmetic counts what it multiplies: 16 rows times what a step takes along K.
TEST(MultiplyInRegisters, CountsWeights) {
  const std::map<std::string, int64_t> step_weights{
      {"float", 1}, {"bf16", 2}, {"int16", 2}, {"int8", 4}, {"bf16 tiles", 2}, {"int8 tiles", 4}};
  for (const std::string& isa : available_kernels()) {
    for (const FormatKernels& format : kernels_named(isa).formats) {
      const int64_t weights = format.multiply_in_registers();
      EXPECT_EQ(weights % (16 * step_weights.at(format.arithmetic)), 0);
      EXPECT_GT(weights, 1000);
    }
  }
}

}  // namespace
}  // namespace lk

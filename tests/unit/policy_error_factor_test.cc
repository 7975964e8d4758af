#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "kernels/policy/error_factor.h"

namespace adaattn {
namespace {

// `count` steps whose log(actual / predicted) has this mean and deviation.
PredictionAudits Steps(int count, double mean, double deviation) {
  std::mt19937 random(5);
  std::normal_distribution<double> normal(mean, deviation);
  PredictionAudits audits;
  for (int i = 0; i < count; ++i)
    audits.Add(static_cast<float>(0.04 * std::exp(normal(random))), 0.04f);
  return audits;
}

TEST(ErrorFactorTest, IsOneWithoutAudits) { EXPECT_FLOAT_EQ(ErrorFactor({}), 1); }

TEST(ErrorFactorTest, IsMeanAndDeviationOfManyAudits) {
  for (const double mean : {-1.0, -0.4, 0.5}) {
    for (const double deviation : {0.1, 0.35, 0.6}) {
      const double expected = kBudgetMargin * std::exp(mean + kErrorFactorDeviations * deviation);
      EXPECT_NEAR(ErrorFactor(Steps(100000, mean, deviation)) / expected, 1, 0.02)
          << mean << " " << deviation;
    }
  }
}

// What it is for: with predictions times the factor, a budget that fills its margin leaves as many
// steps above the target for every head.
TEST(ErrorFactorTest, HeadsMissTheirTargetsEquallyOften) {
  const double expected = 0.5 * std::erfc(kErrorFactorDeviations / std::sqrt(2.0));
  for (const double mean : {-1.0, 0.5}) {
    for (const double deviation : {0.2, 0.5}) {
      const double factor = ErrorFactor(Steps(5000, mean, deviation));
      std::mt19937 random(11);
      std::normal_distribution<double> normal(mean, deviation);
      int above = 0;
      constexpr int kSteps = 100000;
      for (int i = 0; i < kSteps; ++i) {
        // Relative to the target: what the model said before the factor, times what came of it.
        const double said = kBudgetMargin / factor;
        above += said * std::exp(normal(random)) > 1 ? 1 : 0;
      }
      EXPECT_NEAR(above / double{kSteps}, expected, 0.01) << mean << " " << deviation;
    }
  }
}

TEST(ErrorFactorTest, AFewAuditsChangeLittle) {
  const float one = ErrorFactor(Steps(1, 1.0, 0)), many = ErrorFactor(Steps(1000, 1.0, 0));
  EXPECT_GT(one, 1.0f);
  EXPECT_LT(one, 1.15f);
  EXPECT_GT(many, 1.7f);
}

TEST(ErrorFactorTest, AHeadThatAlwaysErrsAlikeReadsLess) {
  EXPECT_LT(ErrorFactor(Steps(1000, -0.3, 0.05)), 0.8f * ErrorFactor(Steps(1000, -0.3, 0.5)));
}

TEST(ErrorFactorTest, StaysInItsRange) {
  EXPECT_FLOAT_EQ(ErrorFactor(Steps(1000, 9, 0.1)), kMostErrorFactor);
  EXPECT_FLOAT_EQ(ErrorFactor(Steps(1000, -9, 0.1)), 1 / kMostErrorFactor);
  EXPECT_FLOAT_EQ(ErrorFactor({}, 3), 3);
  EXPECT_FLOAT_EQ(ErrorFactor(Steps(1000, 1, 0.1), 4), kMostErrorFactor);
}

TEST(ErrorFactorTest, LeavesOutStepsThatSayNothing) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  PredictionAudits audits;
  for (const float x : {0.0f, -1.0f, kNan, kInf}) {
    audits.Add(x, 0.1f);
    audits.Add(0.1f, x);
  }
  EXPECT_EQ(audits.count, 0);
  audits.Add(0.05f, 0.1f);
  EXPECT_EQ(audits.count, 1);
  EXPECT_NEAR(audits.sum, std::log(0.5), 1e-6);
  EXPECT_NEAR(audits.square, std::log(0.5) * std::log(0.5), 1e-6);
}

}  // namespace
}  // namespace adaattn

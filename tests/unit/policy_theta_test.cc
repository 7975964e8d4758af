#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/policy/ladder.h"
#include "kernels/policy/theta.h"

namespace adaattn {
namespace {

// One row of one q head over sealed pages with these shares and the rest dense.
MassSums Masses(const std::vector<float>& shares, float concentration = 0.5f,
                float variance = 0.25f) {
  MassSums sums;
  for (const float share : shares) AddPageMass(share, concentration, variance, &sums);
  AddDenseMass(1.0f - sums.sealed, &sums);
  return sums;
}

DecisionParams Params(Policy policy, float theta) {
  DecisionParams params;
  params.policy = policy;
  params.theta = theta;
  return params;
}

TEST(EntropyThetaTest, IsAShareOfOneOfTheEffectivePages) {
  // Sixteen equal pages: exp(H) = 16.
  const std::vector<float> flat(16, 1.0f / 16);
  const DecisionParams params = Params(Policy::kEntropy, 0.1f);
  EXPECT_NEAR(ThetaFromMasses(params, Masses(flat), 1, 16), 0.1 / 16, 1e-7);
  // One page with everything: H = 0.
  EXPECT_NEAR(ThetaFromMasses(params, Masses({1.0f, 0.0f}), 1, 2), 0.1, 1e-7);
}

TEST(EntropyThetaTest, DecidesAlikeWhenTheContextIsRepeated) {
  const std::vector<float> once = {0.4f, 0.3f, 0.2f, 0.08f, 0.015f, 0.005f};
  std::vector<float> twice;
  for (const float share : once) twice.insert(twice.end(), {share / 2, share / 2});
  const DecisionParams params = Params(Policy::kEntropy, 0.05f);
  const float theta_once = ThetaFromMasses(params, Masses(once), 1, 6);
  const float theta_twice = ThetaFromMasses(params, Masses(twice), 1, 12);
  EXPECT_NEAR(theta_twice, theta_once / 2, 1e-6);
  for (size_t i = 0; i < once.size(); ++i) {
    EXPECT_EQ(LadderValueBits(once[i], theta_once), LadderValueBits(twice[2 * i], theta_twice));
  }
}

TEST(EntropyThetaTest, IsTheMeanOverColumns) {
  MassSums sums = Masses(std::vector<float>(16, 1.0f / 16));
  AddMasses(Masses({1.0f}), &sums);
  // Entropies ln 16 and 0: the mean is ln 4.
  EXPECT_NEAR(ThetaFromMasses(Params(Policy::kEntropy, 0.1f), sums, 2, 16), 0.1 / 4, 1e-6);
}

TEST(EntropyThetaTest, StaysInTheRangeOfTheta) {
  EXPECT_EQ(ThetaFromMasses(Params(Policy::kEntropy, 1.0f), Masses({1.0f}), 1, 1), kMaxTheta);
  const std::vector<float> flat(4096, 1.0f / 4096);
  EXPECT_EQ(ThetaFromMasses(Params(Policy::kEntropy, 1e-6f), Masses(flat), 1, 4096), kMinTheta);
}

TEST(LearnedThetaTest, IsTheExponentialOfTheWeightedFeatures) {
  DecisionParams params = Params(Policy::kLearned, 0.004f);
  params.target_relative_error = 0.0625f;
  const MassSums sums = Masses({0.5f, 0.25f});
  float features[kNumThetaFeatures];
  ThetaFeatures(sums, 1, 2, params.target_relative_error, features);
  const double square = 0.25 + 0.0625;
  const double expected[] = {1,
                             -4,
                             0.5 * std::log(2.0) + 0.5 * std::log(4.0),
                             std::log2(0.75),
                             std::log2(square),
                             std::log2(square * 0.5),
                             std::log2(0.75 * 0.25),
                             1};
  double log_theta = 0;
  for (int i = 0; i < kNumThetaFeatures; ++i) {
    EXPECT_NEAR(features[i], expected[i], 1e-5) << kThetaFeatureNames[i];
    params.theta_model.weights[i] = 0.1f * static_cast<float>(i + 1) - (i == 0 ? 5.0f : 0.5f);
    log_theta += params.theta_model.weights[i] * expected[i];
  }
  EXPECT_NEAR(ThetaFromMasses(params, sums, 1, 2), std::exp2(log_theta), 1e-5);
}

TEST(LearnedThetaTest, WeightsThatMakeNoSenseStayInRange) {
  DecisionParams params = Params(Policy::kLearned, 0.004f);
  params.theta_model.weights[0] = 1e30f;
  EXPECT_EQ(ThetaFromMasses(params, Masses({1.0f}), 1, 1), kMaxTheta);
  params.theta_model.weights[0] = -1e30f;
  EXPECT_EQ(ThetaFromMasses(params, Masses({1.0f}), 1, 1), kMinTheta);
}

TEST(ThetaTest, NothingVisibleAndNanReadDeep) {
  for (const Policy policy : {Policy::kEntropy, Policy::kLearned}) {
    DecisionParams params = Params(policy, 0.05f);
    params.theta_model.weights[2] = 1.0f;
    EXPECT_GE(ThetaFromMasses(params, MassSums(), 1, 0), kMinTheta);
    MassSums sums;
    AddPageMass(std::numeric_limits<float>::quiet_NaN(), 1.0f, 1.0f, &sums);
    sums.entropy = std::numeric_limits<float>::quiet_NaN();
    EXPECT_EQ(ThetaFromMasses(params, sums, 1, 1), kMinTheta);
  }
}

TEST(ThetaTest, ThresholdIsWhatTheCallerSays) {
  EXPECT_EQ(ThetaFromMasses(Params(Policy::kThreshold, 0.5f), Masses({1.0f}), 1, 1), 0.5f);
}

}  // namespace
}  // namespace adaattn

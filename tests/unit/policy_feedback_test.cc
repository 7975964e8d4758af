#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/feedback_state.h"
#include "kernels/policy/feedback.h"

namespace adaattn {
namespace {

constexpr float kTarget = 0.05f;
const float kAim = std::sqrt(FeedbackAim2(kTarget));

TEST(NextThetaTest, StaysWhereTheErrorIsWhatItAimsAt) {
  EXPECT_NEAR(NextTheta(0.01f, kAim, kTarget), 0.01f, 1e-7);
  EXPECT_LT(kAim, kBudgetMargin * kTarget);
}

TEST(NextThetaTest, GoesDownFasterThanUp) {
  // An error of twice the aim is an octave too much.
  EXPECT_NEAR(std::log2(NextTheta(0.01f, 2 * kAim, kTarget) / 0.01f), -kFeedbackDown, 1e-4);
  EXPECT_NEAR(std::log2(NextTheta(0.01f, kAim / 2, kTarget) / 0.01f), kFeedbackUp, 1e-4);
}

TEST(NextThetaTest, TakesNoLeaps) {
  EXPECT_NEAR(NextTheta(0.01f, 0, kTarget), 0.01f * std::exp2(kFeedbackMostUp), 1e-6);
  EXPECT_NEAR(NextTheta(0.1f, 1e6f, kTarget), 0.1f * std::exp2(-kFeedbackMostDown), 1e-6);
  EXPECT_EQ(NextTheta(kMaxTheta, 0, kTarget), kMaxTheta);
  EXPECT_EQ(NextTheta(kMinTheta, 1, kTarget), kMinTheta);
}

TEST(NextThetaTest, ReadsDeeperAfterAnErrorThatIsNoNumber) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_NEAR(NextTheta(0.1f, nan, kTarget), 0.1f * std::exp2(-kFeedbackMostDown), 1e-6);
}

// A head whose error is proportional to theta and to a factor that scatters from step to step by
// half an octave: few steps exceed the target, and the mean is not far below it.
TEST(NextThetaTest, KeepsScatteringErrorsUnderTheTarget) {
  std::mt19937 random(3);
  std::normal_distribution<float> octaves(0, 0.5f);
  constexpr int kSteps = 20000;
  for (const float slope : {0.5f, 4.0f}) {
    float theta = 0.25f;
    double sum = 0;
    int above = 0;
    for (int i = 0; i < kSteps + 100; ++i) {
      const float error = slope * theta * std::exp2(octaves(random));
      theta = NextTheta(theta, error, kTarget);
      if (i < 100) continue;
      sum += error;
      above += error > kTarget ? 1 : 0;
    }
    EXPECT_GT(sum / kSteps, 0.4 * kTarget);
    EXPECT_LT(sum / kSteps, 0.7 * kTarget);
    EXPECT_LT(above, kSteps * 5 / 100);
  }
}

TEST(ThetaForTargetTest, GoesWithTheTarget) {
  EXPECT_NEAR(ThetaForTarget(0.01f, kTarget, kTarget), 0.01f, 1e-7);
  EXPECT_NEAR(ThetaForTarget(0.01f, 0.1f, 0.2f), 0.02f, 0.0003f);
  EXPECT_EQ(ThetaForTarget(0.2f, 0.02f, 0.2f), kMaxTheta);
}

class FeedbackTest : public ::testing::Test {
 protected:
  static SequenceStep Asked(float target) {
    SequenceStep step;
    step.decision.policy = Policy::kFeedback;
    step.decision.target_relative_error = target;
    return step;
  }
  static std::vector<HeadDecision> Decided(const std::vector<float>& thetas,
                                           float predicted_error) {
    std::vector<HeadDecision> heads;
    for (const float theta : thetas) {
      HeadDecision head = {};
      head.theta = theta;
      head.predicted_error = predicted_error;
      heads.push_back(head);
    }
    return heads;
  }
  // What runs next for that target.
  SequenceStep Next(float target, bool bounded = false) {
    SequenceStep step = Asked(target);
    step.decision.bounded = bounded;
    UseFeedback(state_, thetas_, &step);
    return step;
  }

  FeedbackState state_;
  float thetas_[2] = {};
};

TEST_F(FeedbackTest, BeginsWithABudgetAndGoesOnWithWhatItChose) {
  EXPECT_EQ(Next(kTarget).decision.policy, Policy::kBudget);
  EXPECT_TRUE(Next(kTarget).thetas.empty());
  FollowFeedback(Decided({0.01f, 0.002f}, 2 * kAim), kTarget, &state_);
  SequenceStep step = Next(kTarget);
  EXPECT_EQ(step.decision.policy, Policy::kThreshold);
  ASSERT_EQ(step.thetas.size(), 2u);
  EXPECT_EQ(step.thetas[0], NextTheta(0.01f, 2 * kAim, kTarget));
  EXPECT_EQ(step.thetas[1], NextTheta(0.002f, 2 * kAim, kTarget));
  // Of another target, such as one that pressure has raised.
  EXPECT_NEAR(Next(0.1f).thetas[0], ThetaForTarget(state_.thetas[0], kTarget, 0.1f), 1e-7);
}

TEST_F(FeedbackTest, LeavesWhatItCannotFollowToABudget) {
  FollowFeedback(Decided({0.01f, 0.002f}, kAim), kTarget, &state_);
  EXPECT_EQ(Next(0.01f).decision.policy, Policy::kBudget) << "nothing to aim at";
  EXPECT_EQ(Next(kTarget, /*bounded=*/true).decision.policy, Policy::kBudget);
  EXPECT_EQ(Next(kTarget).decision.policy, Policy::kThreshold);
  FollowFeedback(Decided({0.01f, 0}, kAim), kTarget, &state_);
  EXPECT_EQ(Next(kTarget).decision.policy, Policy::kBudget) << "a head without theta";
  FollowFeedback(Decided({0.01f, 0.002f}, kAim), 0.01f, &state_);
  EXPECT_EQ(Next(kTarget).decision.policy, Policy::kBudget) << "that had nothing to aim at";
}

}  // namespace
}  // namespace adaattn

// Progressive decode against the double-precision reference over the same pages.

#include <gtest/gtest.h>

#include <string>
#include <tuple>

#include "kernels/policy/names.h"
#include "tests/backend/progressive_harness.h"

namespace adaattn {
namespace {

DecisionParams Threshold(float theta, int32_t coarse_rank = 0) {
  DecisionParams params;
  params.policy = Policy::kThreshold;
  params.theta = theta;
  params.coarse_rank = coarse_rank;
  return params;
}

DecisionParams Budget(float target) {
  DecisionParams params;
  params.policy = Policy::kBudget;
  params.target_relative_error = target;
  return params;
}

DecisionParams Static(int32_t key_bits, int32_t rank, int32_t value_bits) {
  DecisionParams params;
  params.policy = Policy::kStatic;
  params.static_key_bits = key_bits;
  params.static_rank = rank;
  params.static_value_bits = value_bits;
  return params;
}

DecisionParams Full() {
  DecisionParams params;
  params.policy = Policy::kFullDepth;
  return params;
}

DecisionParams Relative(float theta) {
  DecisionParams params;
  params.policy = Policy::kEntropy;
  params.theta = theta;
  return params;
}

// A model that makes something of every feature and stays inside the range of theta.
DecisionParams Learned(float target) {
  DecisionParams params;
  params.policy = Policy::kLearned;
  params.target_relative_error = target;
  params.theta_model = {{-1.0f, 1.2f, -0.3f, 0.4f, 0.2f, -0.1f, -0.3f, -0.2f}};
  return params;
}

using Shape = std::tuple<int32_t, int32_t>;  // head_dim, group size

class ProgressiveShapeTest : public ::testing::TestWithParam<Shape> {};

TEST_P(ProgressiveShapeTest, MatchesTheReferenceUnderEveryPolicy) {
  ProgressiveOptions options;
  options.shape = {2 * std::get<1>(GetParam()), 2, std::get<0>(GetParam())};
  const bool odd_group = std::get<1>(GetParam()) % 2 != 0;
  options.format = odd_group ? PageFormat::kProgressiveF16 : PageFormat::kProgressive;
  ProgressiveHarness progressive(options);
  ASSERT_TRUE(progressive.harness().ok());
  const int32_t half = options.shape.head_dim / 2;
  for (const DecisionParams& params :
       {Threshold(0.004f), Threshold(0.02f, half), Threshold(0.0005f), Budget(0.05f), Budget(0.3f),
        Static(6, half, 4), Full(), Relative(0.05f), Learned(0.1f)}) {
    SCOPED_TRACE(DebugString(params));
    if (!progressive.harness().Supports(params.policy)) continue;
    StepCase step = progressive.NewStep(1);
    step.decision = params;
    progressive.RunAndCompare(step);
  }
}

TEST_P(ProgressiveShapeTest, MatchesTheReferenceWithAThetaOfEachHead) {
  ProgressiveOptions options;
  options.shape = {4 * std::get<1>(GetParam()), 4, std::get<0>(GetParam())};
  ProgressiveHarness progressive(options);
  ASSERT_TRUE(progressive.harness().ok());
  for (const int32_t coarse_rank : {0, options.shape.head_dim / 2}) {
    SCOPED_TRACE(coarse_rank);
    StepCase step = progressive.NewStep(1);
    step.decision = Threshold(0.25f, coarse_rank);
    step.thetas = {0.02f, 0.0005f, 0.004f, 0.1f};
    const StepOutput output = progressive.RunAndCompare(step);
    for (size_t head = 0; head < step.thetas.size(); ++head) {
      EXPECT_EQ(output.decisions[head].theta, step.thetas[head]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(AllShapes, ProgressiveShapeTest,
                         ::testing::Combine(::testing::Values(64, 80, 96, 128, 256),
                                            ::testing::Values(1, 3, 6, 8)),
                         [](const ::testing::TestParamInfo<Shape>& info) {
                           return "d" + std::to_string(std::get<0>(info.param)) + "_g" +
                                  std::to_string(std::get<1>(info.param));
                         });

class ProgressiveTest : public ::testing::Test {
 protected:
  static ProgressiveOptions Options() {
    ProgressiveOptions options;
    options.shape = {6, 2, 64};
    return options;
  }
};

// So many heads that on a device one launch ends the step, whose clusters have fewer CTAs than a
// head has columns; or so many that a CTA of the last launch takes a head.
TEST_F(ProgressiveTest, MatchesTheReferenceWithManyHeads) {
  for (const AttentionShape& shape :
       {AttentionShape{192, 24, 64}, AttentionShape{160, 40, 64}, AttentionShape{192, 48, 64},
        AttentionShape{544, 136, 64}, AttentionShape{1072, 268, 64}}) {
    SCOPED_TRACE(shape.DebugString());
    ProgressiveOptions options = Options();
    options.shape = shape;
    ProgressiveHarness progressive(options);
    ASSERT_TRUE(progressive.harness().ok());
    StepCase step = progressive.NewStep(1);
    step.decision = Threshold(0.004f);
    progressive.RunAndCompare(step);
  }
}

// On a device several lists a thread that looks for attend's slice.
TEST_F(ProgressiveTest, MatchesTheReferenceWithMoreHeadsThanThreads) {
  ProgressiveOptions options = Options();
  options.shape = {520, 520, 64};
  options.length = 200;
  ProgressiveHarness progressive(options);
  ASSERT_TRUE(progressive.harness().ok());
  StepCase step = progressive.NewStep(1);
  step.decision = Threshold(0.004f);
  progressive.RunAndCompare(step);
}

TEST_F(ProgressiveTest, ReadsSeveralDepthsAndSkipsPages) {
  ProgressiveHarness progressive(Options());
  ASSERT_TRUE(progressive.harness().ok());
  StepCase step = progressive.NewStep(1);
  step.decision = Threshold(0.02f);
  step.softmax_scale = 0.4f;
  const StepOutput output = progressive.RunAndCompare(step);
  int32_t depths = 0;
  for (const int32_t pages : output.decisions[0].value_pages) depths += pages > 0 ? 1 : 0;
  EXPECT_GE(depths, 3) << "the test's data are to exercise the ladder";
  EXPECT_GT(output.decisions[0].value_pages[0], 0);
}

TEST_F(ProgressiveTest, MatchesTheReferenceAtEveryStoredDepth) {
  for (const int32_t stored_bits : {8, 6, 4}) {
    SCOPED_TRACE(stored_bits);
    ProgressiveOptions options = Options();
    options.stored_bits = stored_bits;
    ProgressiveHarness progressive(options);
    ASSERT_TRUE(progressive.harness().ok());
    for (const DecisionParams& params : {Threshold(0.001f), Threshold(0.02f, 32), Full()}) {
      SCOPED_TRACE(DebugString(params));
      StepCase step = progressive.NewStep(1);
      step.decision = params;
      progressive.RunAndCompare(step);
    }
  }
}

// A token that comes back makes the values err together: the fit sees it, and predictions and the
// budget's theta follow.
TEST_F(ProgressiveTest, PredictsByWhatTheFitMeasured) {
  for (const PageFormat format : {PageFormat::kProgressive, PageFormat::kProgressiveF16}) {
    ProgressiveOptions options = Options();
    options.format = format;
    options.length = 1500;
    options.repeat = 16;
    options.sample_rows = 20;
    ProgressiveHarness progressive(options);
    ASSERT_TRUE(progressive.harness().ok());
    for (int32_t head = 0; head < options.shape.num_kv_heads; ++head) {
      EXPECT_GT(progressive.value_factors(head).spread, 1.3f)
          << "the data are to make a difference";
      EXPECT_GT(progressive.value_factors(head).rounding, 1.3f);
    }
    for (const DecisionParams& params :
         {Threshold(0.02f), Static(8, 0, 2), Budget(0.1f), Budget(0.3f)}) {
      SCOPED_TRACE(DebugString(params));
      StepCase step = progressive.NewStep(1);
      step.decision = params;
      progressive.RunAndCompare(step);
    }
  }
}

// Factors of predicted errors, whether the backend fits the basis or is brought one: predictions
// and the budget's theta follow them, head by head.
TEST_F(ProgressiveTest, PredictionsAreTimesTheErrorFactors) {
  for (const int32_t sample_rows : {0, 20}) {
    ProgressiveOptions options = Options();
    options.sample_rows = sample_rows;
    ProgressiveHarness plain(options);
    ASSERT_TRUE(plain.harness().ok());
    for (int32_t head = 0; head < options.shape.num_kv_heads; ++head) {
      options.error_factors.push_back(head % 2 == 0 ? 2.0f : 0.5f);
    }
    ProgressiveHarness scaled(options);
    for (const DecisionParams& params : {Threshold(0.02f), Static(8, 0, 2), Budget(0.2f)}) {
      SCOPED_TRACE(DebugString(params));
      StepCase step = plain.NewStep(1), same = scaled.NewStep(1);
      step.decision = same.decision = params;
      const StepOutput before = plain.RunAndCompare(step), after = scaled.RunAndCompare(same);
      if (params.policy == Policy::kBudget) continue;  // reads otherwise
      // A prediction is E / sqrt(|o|^2 + E^2); what keys err by has no factor.
      const auto error = [](const HeadDecision& head) {
        const float p = head.predicted_error;
        return p / std::sqrt(1 - p * p);
      };
      for (int32_t head = 0; head < options.shape.num_kv_heads; ++head) {
        const float ratio = error(after.decisions[head]) / error(before.decisions[head]);
        EXPECT_NEAR(std::log2(ratio), head % 2 == 0 ? 1 : -1, 0.25) << "head " << head;
      }
    }
  }
}

TEST_F(ProgressiveTest, MatchesTheReferenceOverSeveralBases) {
  for (const int32_t num_bases : {2, 3, 4}) {
    SCOPED_TRACE(num_bases);
    ProgressiveOptions options = Options();
    options.num_bases = num_bases;
    ProgressiveHarness progressive(options);
    ASSERT_TRUE(progressive.harness().ok());
    StepCase step = progressive.NewStep(1);
    step.decision = Threshold(0.004f);
    progressive.RunAndCompare(step);
  }
}

TEST_F(ProgressiveTest, MatchesTheReferenceWithManyRowsWindowsAndSoftCap) {
  ProgressiveHarness progressive(Options());
  ASSERT_TRUE(progressive.harness().ok());
  for (const int32_t q_len : {1, 2, 5, 8}) {
    for (const int64_t window : {0, 1, 100, 333, 640}) {
      for (const float softcap : {0.0f, 4.0f}) {
        for (const DecisionParams& params :
             {Threshold(0.01f), Threshold(0.01f, 16), Relative(0.05f), Full()}) {
          if (!progressive.harness().Supports(params.policy)) continue;
          SCOPED_TRACE("q_len " + std::to_string(q_len) + " window " + std::to_string(window) +
                       " softcap " + std::to_string(softcap) + " " + DebugString(params));
          StepCase step = progressive.NewStep(q_len);
          step.window = window;
          step.softcap = softcap;
          step.decision = params;
          progressive.RunAndCompare(step);
        }
      }
    }
  }
}

TEST_F(ProgressiveTest, SeesNoKeyBehindARowInsideSealedPages) {
  ProgressiveHarness progressive(Options());
  ASSERT_TRUE(progressive.harness().ok());
  for (const int64_t q_start : {0, 63, 64, 200}) {
    SCOPED_TRACE(q_start);
    StepCase step = progressive.NewStep(3);
    step.q_start = q_start;
    step.decision = Threshold(0.01f);
    progressive.RunAndCompare(step);
  }
}

TEST_F(ProgressiveTest, SaysWhereAStepsTimeWent) {
  ProgressiveHarness progressive(Options());
  ASSERT_TRUE(progressive.harness().ok());
  StepCase step = progressive.NewStep(1);
  step.decision = Budget(0.05f);
  progressive.harness().Run({step});
  const StageTimes times = progressive.harness().stage_times();
  EXPECT_GT(times.scan, absl::ZeroDuration());
  EXPECT_GT(times.select, absl::ZeroDuration());
  EXPECT_GT(times.attend, absl::ZeroDuration());
  EXPECT_GT(times.merge, absl::ZeroDuration());
  EXPECT_LT(times.append + times.scan + times.select + times.attend + times.merge,
            absl::Seconds(10));
  // A step without sealed pages has nothing to scan: times of an earlier step do not linger.
  TestSequence dense = progressive.harness().NewSequence(100);
  StepCase exact;
  exact.sequence = &dense;
  exact.append_len = 1;
  progressive.harness().Run({exact});
  EXPECT_EQ(progressive.harness().stage_times().scan, absl::ZeroDuration());
  EXPECT_EQ(progressive.harness().stage_times().select, absl::ZeroDuration());
  EXPECT_GT(progressive.harness().stage_times().append, absl::ZeroDuration());
  EXPECT_GT(progressive.harness().stage_times().attend, absl::ZeroDuration());
}

TEST_F(ProgressiveTest, KeepsTheFloors) {
  ProgressiveHarness progressive(Options());
  ASSERT_TRUE(progressive.harness().ok());
  StepCase step = progressive.NewStep(1);
  step.decision = Threshold(0.2f);
  step.decision.floor_key_bits = 6;
  step.decision.floor_value_bits = 4;
  const StepOutput output = progressive.RunAndCompare(step);
  EXPECT_EQ(output.decisions[0].value_pages[0] + output.decisions[0].value_pages[1], 0);
}

}  // namespace
}  // namespace adaattn

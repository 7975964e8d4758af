#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/policy/budget.h"
#include "kernels/policy/entropy.h"
#include "kernels/policy/names.h"

namespace adaattn {
namespace {

using ::testing::HasSubstr;

constexpr int32_t kDim = 64;

PageErrorInputs Inputs(float share) {
  PageErrorInputs inputs;
  inputs.share = share;
  inputs.concentration = 0.25f;
  inputs.score_variance = 0.04f;
  inputs.mean_distance2 = 3.0f;
  inputs.spread = 2.0f;
  inputs.scale_rms = 1.0f;
  return inputs;
}

std::vector<PageBudget> Budgets(const std::vector<float>& shares) {
  std::vector<PageBudget> pages;
  for (const float share : shares) {
    PageBudget page;
    AddToBudget(share, ErrorParts(Inputs(share), kDim), /*weight=*/0.5f, &page);
    pages.push_back(page);
  }
  return pages;
}

double ErrorAt(const DecisionParams& params, const std::vector<PageBudget>& pages, float theta) {
  ErrorTerms sum;
  for (const PageBudget& page : pages) {
    AddTerms(BudgetTermsAt(params, page, theta, kDim, 8), &sum);
  }
  return std::sqrt(ErrorSquare(sum));
}

DecisionParams BudgetParams(float target) {
  DecisionParams params;
  params.policy = Policy::kBudget;
  params.target_relative_error = target;
  return params;
}

TEST(ErrorModelTest, PageErrorIsTheFormula) {
  const PageErrorInputs page = Inputs(0.1f);
  const ErrorTerms skipped = TermsOf(ErrorParts(page, kDim), 1, 0);
  EXPECT_NEAR(skipped.square, 0.01 * 0.25 * 4.0, 1e-8);
  EXPECT_NEAR(skipped.amplitude, 0.1 * 0.5 * 2.0, 1e-8);
  const double value_variance = 64 * std::pow(1.0 / 8, 2) / 12;  // 4 bits: steps of r / 8
  const ErrorTerms read = TermsOf(ErrorParts(page, kDim), 1, 4);
  EXPECT_NEAR(read.square,
              0.01 * 0.25 * (std::pow(1 - 0.025, 2) * 0.04 * (4.0 + 3.0) + value_variance), 1e-8);
  EXPECT_EQ(read.amplitude, 0.0f);
}

TEST(ErrorModelTest, SkippedPagesAddUpInPart) {
  ErrorTerms sum;
  for (int i = 0; i < 100; ++i) AddTerms(TermsOf(ErrorParts(Inputs(0.01f), kDim), 1, 0), &sum);
  const double one = 0.0001 * 0.25 * 4.0;
  EXPECT_NEAR(ErrorSquare(sum), 100 * one + kCoherence * 100 * 100 * one, 1e-6);
}

TEST(ErrorModelTest, RelativeErrorCountsWhatWasLost) {
  ErrorTerms terms;
  EXPECT_EQ(RelativeErrorSquare(terms, 0.0f), 0.0f);
  terms.square = 1.0f;
  EXPECT_EQ(RelativeErrorSquare(terms, 0.0f), 1.0f);
  EXPECT_EQ(RelativeErrorSquare(terms, 3.0f), 0.25f);
}

TEST(ErrorModelTest, ATokenWithAllMassIsWhatItIsWhateverItsScore) {
  PageErrorInputs page = Inputs(1.0f);
  page.concentration = 1.0f;
  const float before = TermsOf(ErrorParts(page, kDim), 1, 8).square;
  page.score_variance = 4.0f;
  EXPECT_FLOAT_EQ(TermsOf(ErrorParts(page, kDim), 1, 8).square, before);
}

TEST(ErrorModelTest, ScoreVarianceCountsReadAndUnreadChannels) {
  const std::vector<float> query = {1.0f, 2.0f, 3.0f, 4.0f};
  // Ranges 1, 2, 4, 8.
  const std::vector<uint8_t> scales = {160, 164, 168, 172};
  const double read = (1.0 + 16.0) * std::pow(2.0 / 16, 2) / 12;  // 4 bits: steps of r / 8
  const double unread = (144.0 + 1024.0) / 6;
  EXPECT_NEAR(ScoreVariance(query.data(), scales.data(), 4, 4, 2, 0.5f),
              0.25 * (17.0 * std::pow(1.0 / 8, 2) / 12 + unread), 1e-4);
  EXPECT_LT(read, unread);
  const float at4 = ScoreVariance(query.data(), scales.data(), 4, 4, 4, 1.0f);
  EXPECT_FLOAT_EQ(ScoreVariance(query.data(), scales.data(), 4, 6, 4, 1.0f),
                  ScoreVarianceAt(at4, 6));
  EXPECT_FLOAT_EQ(ScoreVariance(query.data(), scales.data(), 4, 8, 4, 1.0f),
                  ScoreVarianceAt(at4, 8));
}

TEST(ErrorModelTest, LogMassGrowsByHalfTheVarianceUpToItsCap) {
  EXPECT_FLOAT_EQ(PageLogMass(3.0f, 0.5f), 3.25f);
  EXPECT_FLOAT_EQ(PageLogMass(3.0f, 100.0f), 3.0f + 0.5f * kMaxScoreVariance);
}

TEST(ErrorModelTest, FirstTokenStandsOnlyForAConcentratedVisibleSink) {
  EXPECT_TRUE(FirstTokenStandsForPage(true, true, 0.9f));
  EXPECT_FALSE(FirstTokenStandsForPage(false, true, 0.9f));
  EXPECT_FALSE(FirstTokenStandsForPage(true, false, 0.9f));
  EXPECT_FALSE(FirstTokenStandsForPage(true, true, 0.5f));
}

TEST(BudgetTest, GridIsHalfOctaves) {
  EXPECT_FLOAT_EQ(BudgetTheta(0), std::exp2(-16.0f));
  EXPECT_FLOAT_EQ(BudgetTheta(kNumBudgetThetas - 1), 0.25f);
  for (int32_t i = 1; i < kNumBudgetThetas; ++i) {
    EXPECT_NEAR(BudgetTheta(i) / BudgetTheta(i - 1), std::sqrt(2.0), 1e-5);
  }
}

TEST(BudgetTest, KnowsWhereAPagesDepthChanges) {
  std::vector<float> shares = {0, 1e-9f, 1.0f, std::numeric_limits<float>::quiet_NaN()};
  for (int32_t i = 0; i < kNumBudgetThetas; ++i) {
    for (const float scale : {0.999f, 1.0f, 1.001f, 4.0f, 64.0f}) {
      shares.push_back(scale * BudgetTheta(i));
    }
  }
  for (const float share : shares) {
    const int32_t below = NumThetasBelow(share);
    for (int32_t i = 0; i < kNumBudgetThetas; ++i) {
      const int32_t bits = i < below - 12  ? 8
                           : i < below - 8 ? 6
                           : i < below - 4 ? 4
                           : i < below     ? 2
                                           : 0;
      EXPECT_EQ(LadderValueBits(share, BudgetTheta(i)), bits) << share << " at " << i;
    }
  }
}

// What the device sums by rung is what the ladder says for every theta.
TEST(BudgetTest, RungsGiveTheTermsOfTheLadder) {
  std::vector<float> shares = {0, 1e-9f, 0.3f, 1.0f};  // 1: above 12 more than the grid has
  for (int32_t i = 0; i < kNumBudgetThetas; i += 3) {
    for (const float scale : {0.999f, 1.0f, 1.001f}) shares.push_back(scale * BudgetTheta(i));
  }
  const PageFacts facts[] = {
      {false, false, true}, {false, true, true}, {true, false, true}, {false, false, false}};
  for (const int32_t floor_value_bits : {0, 4}) {
    for (const int32_t stored_bits : {8, 6, 4}) {
      DecisionParams params = BudgetParams(0.05f);
      params.floor_value_bits = floor_value_bits;
      params.floor_key_bits = floor_value_bits == 0 ? 4 : 6;
      for (const PageFacts& fact : facts) {
        for (PageBudget page : Budgets(shares)) {
          page.facts = fact;
          const int32_t below = NumThetasBelow(page.share);
          const auto expect_at = [&](int32_t rung, float theta) {
            const ErrorTerms expected = BudgetTermsAt(params, page, theta, kDim, stored_bits);
            const ErrorTerms terms =
                TermsOf(page.parts, RungFactors(params, rung, fact, kDim, stored_bits));
            EXPECT_FLOAT_EQ(terms.square, expected.square) << page.share << " at " << theta;
            EXPECT_FLOAT_EQ(terms.amplitude, expected.amplitude) << page.share << " at " << theta;
          };
          for (int32_t i = 0; i < kNumBudgetThetas; ++i) {
            expect_at(BudgetRung(below, i), BudgetTheta(i));
          }
          expect_at(page.share > 0 ? kNumRungs - 1 : 0, 0.0f);
        }
      }
    }
  }
}

TEST(BudgetTest, ErrorsFallWithDepth) {
  const DecisionParams params = BudgetParams(0.05f);
  const std::vector<PageBudget> pages = Budgets({0.2f});
  float last = std::numeric_limits<float>::infinity();
  for (const float theta : {0.1f, 0.04f, 0.01f, 0.002f}) {  // 2, 4, 6, 8 bits
    const float square = BudgetTermsAt(params, pages[0], theta, kDim, 8).square;
    EXPECT_LT(square, last) << theta;
    last = square;
  }
}

TEST(BudgetTest, TheFloorMattersToSmallTargetsOnly) {
  EXPECT_LT(BudgetLimit2(0.01f), 0.0f);
  EXPECT_NEAR(std::sqrt(BudgetLimit2(0.02f)) / 0.02, 0.56, 0.01);
  EXPECT_NEAR(std::sqrt(BudgetLimit2(0.1f)) / 0.1, kBudgetMargin, 0.006);
  const BudgetChoice choice = ChooseTheta(BudgetParams(0.01f), Budgets({0.1f, 0.01f}), kDim, 8);
  EXPECT_TRUE(choice.fallback);
  EXPECT_EQ(choice.theta, 0.0f);
}

TEST(BudgetTest, TakesTheLargestThetaThatFits) {
  const std::vector<float> shares = {0.3f, 0.1f, 0.05f, 0.02f, 0.01f, 0.002f, 0.0005f};
  float last = 0.0f;
  for (const float target : {0.02f, 0.05f, 0.1f, 0.3f}) {
    const DecisionParams params = BudgetParams(target);
    const std::vector<PageBudget> pages = Budgets(shares);
    const BudgetChoice choice = ChooseTheta(params, pages, kDim, 8);
    ASSERT_FALSE(choice.fallback) << target;
    EXPECT_GE(choice.theta, last) << "a wider budget never reads more";
    const double limit = std::sqrt(BudgetLimit2(target));
    EXPECT_LT(limit, kBudgetMargin * target);
    EXPECT_LE(choice.predicted_error, limit);
    EXPECT_NEAR(choice.predicted_error, ErrorAt(params, pages, choice.theta), 1e-6);
    if (choice.theta < 0.25f) {
      EXPECT_GT(ErrorAt(params, pages, choice.theta * 1.41421356f), limit)
          << "the next theta would not fit";
    }
    last = choice.theta;
  }
  EXPECT_GT(last, 0.0f);
}

TEST(BudgetTest, FallsBackToFullDepthWhereNothingFits) {
  const DecisionParams params = BudgetParams(1e-5f);
  const std::vector<PageBudget> pages = Budgets({0.9f, 0.05f});
  const BudgetChoice choice = ChooseTheta(params, pages, kDim, 8);
  EXPECT_TRUE(choice.fallback);
  EXPECT_EQ(choice.theta, 0.0f);
  EXPECT_NEAR(choice.predicted_error, ErrorAt(params, pages, 0), 1e-7);
  EXPECT_EQ(LadderDepth(params, choice.theta, 0.05f, {}, kDim, 8).value_bits, 8);
}

TEST(BudgetTest, NoPagesNeedNoBits) {
  const BudgetChoice choice = ChooseTheta(BudgetParams(0.05f), {}, kDim, 8);
  EXPECT_FALSE(choice.fallback);
  EXPECT_EQ(choice.predicted_error, 0.0f);
}

TEST(BudgetTest, FlatAttentionMaySkipWhatOnePeakMayNot) {
  const DecisionParams params = BudgetParams(0.1f);
  const std::vector<float> flat(128, 1.0f / 128);
  const BudgetChoice over_flat = ChooseTheta(params, Budgets(flat), kDim, 8);
  const BudgetChoice over_peak = ChooseTheta(params, Budgets({1.0f}), kDim, 8);
  // The flat pages' errors average out, so a page may hold more than its share before it is read.
  EXPECT_GT(over_flat.theta, 1.0f / 512);
  EXPECT_GE(LadderValueBits(1.0f, over_peak.theta), 4);
}

TEST(BudgetTest, ANanPredictionFallsBack) {
  PageBudget page;
  PageErrorInputs inputs = Inputs(0.5f);
  inputs.mean_distance2 = std::numeric_limits<float>::quiet_NaN();
  const DecisionParams params = BudgetParams(0.5f);
  AddToBudget(inputs.share, ErrorParts(inputs, kDim), 0.5f, &page);
  EXPECT_TRUE(ChooseTheta(params, {&page, 1}, kDim, 8).fallback);
}

TEST(EntropyTest, IsThatOfTheDistribution) {
  const std::vector<double> flat(32, 5.0);
  EXPECT_NEAR(Entropy(flat), std::log(32.0), 1e-12);
  EXPECT_NEAR(LogSumExp(flat), 5.0 + std::log(32.0), 1e-12);
  EXPECT_NEAR(Entropy({0.0, -1000.0}), 0.0, 1e-12);
  EXPECT_NEAR(Entropy({std::log(0.25), std::log(0.75)}),
              -0.25 * std::log(0.25) - 0.75 * std::log(0.75), 1e-12);
}

TEST(EntropyTest, NothingHasNone) {
  const double none = -std::numeric_limits<double>::infinity();
  EXPECT_EQ(Entropy({}), 0.0);
  EXPECT_EQ(Entropy({none, none}), 0.0);
  EXPECT_EQ(LogSumExp({none}), none);
  EXPECT_NEAR(Entropy({none, 3.0, 3.0}), std::log(2.0), 1e-12);
  const float missing = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(EntropyTerm(missing, 3.0f), 0.0f);
  EXPECT_EQ(EntropyTerm(missing, missing), 0.0f);
  EXPECT_NEAR(EntropyTerm(3.0f, 3.0f + std::log(2.0f)), 0.5 * std::log(2.0), 1e-6);
}

TEST(DecisionTest, RecountedBytesAreThoseOfTheDepths) {
  HeadDecision decision = {};
  decision.key_pages[KeyDepthIndex(4, 2)] = 3;
  decision.key_pages[KeyDepthIndex(8, 4)] = 2;
  decision.value_pages[0] = 4;
  decision.value_pages[4] = 1;
  decision.dense_tokens = 70;
  const ReadBytes bytes = RecountBytes(decision, 128, DType::kBf16);
  const int64_t dense = int64_t{70} * 128 * 2;
  EXPECT_EQ(bytes.key, 3 * (128 + 64 * 64 / 2) + 2 * (128 + 128 * 64) + dense);
  EXPECT_EQ(bytes.value, 5 * (16 + 128) + (64 * 2 + 128 * 64) + dense);
}

TEST(DecisionTest, KeyDepthIndexNamesEveryDepthOnce) {
  int32_t index = 0;
  for (const int32_t bits : {4, 6, 8}) {
    for (int32_t chunks = 1; chunks <= kMaxRankChunks; ++chunks, ++index) {
      EXPECT_EQ(KeyDepthIndex(bits, chunks), index);
      EXPECT_EQ(KeyDepthBits(index), bits);
      EXPECT_EQ(KeyDepthChunks(index), chunks);
    }
  }
  EXPECT_EQ(index, kNumKeyDepths);
}

TEST(PolicyNamesTest, EveryNameIsReadBack) {
  for (const Policy policy : {Policy::kFullDepth, Policy::kStatic, Policy::kThreshold,
                              Policy::kBudget, Policy::kEntropy, Policy::kLearned}) {
    EXPECT_EQ(ParsePolicy(PolicyName(policy)), policy);
    DecisionParams params;
    params.policy = policy;
    EXPECT_THAT(DebugString(params), HasSubstr(PolicyName(policy)));
  }
  EXPECT_EQ(ParsePolicy("exact"), std::nullopt);
  EXPECT_EQ(ParsePolicy(""), std::nullopt);
}

}  // namespace
}  // namespace adaattn

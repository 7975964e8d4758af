#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/format/page_layout.h"
#include "kernels/policy/counter_random.h"
#include "kernels/policy/entropy.h"
#include "kernels/policy/entropy_estimators.h"
#include "kernels/policy/rank.h"

namespace adaattn {
namespace {

constexpr float kUnseen = -std::numeric_limits<float>::infinity();

std::vector<double> PageLse(const std::vector<float>& scores) {
  std::vector<double> lse;
  for (size_t begin = 0; begin < scores.size(); begin += kPageTokens) {
    const size_t end = std::min(scores.size(), begin + kPageTokens);
    lse.push_back(LogSumExp(std::vector<double>(scores.begin() + begin, scores.begin() + end)));
  }
  return lse;
}

std::vector<float> Scores(size_t count, float spread, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> scores(count);
  for (float& score : scores) score = normal(random);
  return scores;
}

// Known answers of the generator's authors (Random123, kat_vectors).
TEST(CounterRandomTest, IsPhilox) {
  const auto words = [](uint64_t seed, uint64_t index, uint64_t stream) {
    const RandomBlock block = RandomBlockAt(seed, index, stream);
    return std::vector<uint32_t>(block.word, block.word + 4);
  };
  EXPECT_THAT(words(0, 0, 0),
              testing::ElementsAre(0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u));
  EXPECT_THAT(words(~0ull, ~0ull, ~0ull),
              testing::ElementsAre(0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu));
  EXPECT_THAT(words(0x299f31d0a4093822ull, 0x85a308d3243f6a88ull, 0x0370734413198a2eull),
              testing::ElementsAre(0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u));
}

TEST(CounterRandomTest, NumbersHaveTheirMoments) {
  constexpr int kCount = 20000;
  double uniform = 0, sign = 0, normal = 0, square = 0;
  for (uint64_t i = 0; i < kCount; ++i) {
    uniform += UniformAt(7, i, 1) / kCount;
    sign += SignAt(7, i, 2) / kCount;
    const double x = NormalAt(7, i, 3);
    normal += x / kCount;
    square += x * x / kCount;
  }
  EXPECT_NEAR(uniform, 0.5, 0.01);
  EXPECT_NEAR(sign, 0, 0.03);
  EXPECT_NEAR(normal, 0, 0.03);
  EXPECT_NEAR(square, 1, 0.05);
}

TEST(EntropyEstimatorTest, ProxyLiesBelowExactByAtMostThatOfOnePage) {
  for (const float spread : {0.0f, 1.0f, 3.0f, 10.0f}) {
    const std::vector<float> scores = Scores(2000, spread, 3);
    const double exact = ExactAttentionEntropy(scores);
    const double proxy = ProxyAttentionEntropy(PageLse(scores));
    EXPECT_LE(proxy, exact + 1e-9) << spread;
    EXPECT_GE(proxy, exact - std::log(64.0) - 1e-9) << spread;
  }
}

TEST(EntropyEstimatorTest, SamplesAreUnbiasedAndTheirIntervalCovers) {
  const std::vector<float> scores = Scores(4096, 2.5f, 5);
  const std::vector<double> lse = PageLse(scores);
  const double exact = ExactAttentionEntropy(scores);
  constexpr int kTrials = 400;
  double sum = 0;
  int covered = 0;
  for (uint64_t seed = 0; seed < kTrials; ++seed) {
    const EntropyEstimate estimate = SampledAttentionEntropy(scores, lse, 16, seed);
    sum += estimate.entropy;
    covered += estimate.low <= exact && exact <= estimate.high ? 1 : 0;
    EXPECT_LE(estimate.pages_read, 16);
    EXPECT_LE(estimate.low, estimate.entropy);
    EXPECT_GE(estimate.high, estimate.entropy);
  }
  EXPECT_NEAR(sum / kTrials, exact, 0.02);
  EXPECT_GE(covered, kTrials * 0.88) << "of nominal .95; 16 draws of a skewed spread give less";
}

TEST(EntropyEstimatorTest, OneSeedDrawsTheSamePages) {
  const std::vector<float> scores = Scores(4096, 2.5f, 5);
  const std::vector<double> lse = PageLse(scores);
  EXPECT_EQ(SampledAttentionEntropy(scores, lse, 8, 9).entropy,
            SampledAttentionEntropy(scores, lse, 8, 9).entropy);
  EXPECT_NE(SampledAttentionEntropy(scores, lse, 8, 9).entropy,
            SampledAttentionEntropy(scores, lse, 8, 10).entropy);
}

TEST(EntropyEstimatorTest, AllMassOnOneTokenHasNone) {
  std::vector<float> scores(640, -200.0f);
  scores[333] = 0;
  const std::vector<double> lse = PageLse(scores);
  EXPECT_NEAR(ExactAttentionEntropy(scores), 0, 1e-9);
  EXPECT_NEAR(ProxyAttentionEntropy(lse), 0, 1e-9);
  const EntropyEstimate sampled = SampledAttentionEntropy(scores, lse, 4, 1);
  EXPECT_NEAR(sampled.entropy, 0, 1e-9);
  EXPECT_EQ(sampled.pages_read, 1);
}

TEST(EntropyEstimatorTest, PerfectlyFlatAttentionIsKnownExactly) {
  const std::vector<float> scores(640, 1.5f);
  const std::vector<double> lse = PageLse(scores);
  const EntropyEstimate sampled = SampledAttentionEntropy(scores, lse, 4, 1);
  EXPECT_NEAR(sampled.entropy, std::log(640.0), 1e-6);
  EXPECT_NEAR(sampled.low, sampled.high, 1e-6) << "every page says the same";
  EXPECT_NEAR(ProxyAttentionEntropy(lse), std::log(10.0), 1e-9);
}

TEST(EntropyEstimatorTest, NothingVisibleHasNone) {
  const std::vector<float> scores(128, kUnseen);
  EXPECT_EQ(ExactAttentionEntropy(scores), 0);
  EXPECT_EQ(SampledAttentionEntropy(scores, PageLse(scores), 4, 1).entropy, 0);
  EXPECT_EQ(ExactAttentionEntropy({}), 0);
  EXPECT_EQ(SampledAttentionEntropy({}, {}, 4, 1).high, 0);
}

// Rows whose coordinates are independent with standard deviations `scales`.
std::vector<float> Rows(int64_t rows, const std::vector<double>& scales, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<float> x;
  for (int64_t i = 0; i < rows; ++i) {
    for (const double scale : scales) x.push_back(static_cast<float>(scale * normal(random)));
  }
  return x;
}

std::vector<double> Decaying(int32_t dim) {
  std::vector<double> scales;
  scales.reserve(dim);
  for (int32_t c = 0; c < dim; ++c) scales.push_back(std::exp(-c / 8.0));
  return scales;
}

TEST(RankTest, SpectraHaveTheRankOfTheirEntropy) {
  EXPECT_NEAR(RankOfSpectrum({1, 1, 1, 1}), 4, 1e-12);
  EXPECT_NEAR(RankOfSpectrum({5, 0, 0}), 1, 1e-12);
  EXPECT_NEAR(RankOfSpectrum({3, 1}), std::exp(-.75 * std::log(.75) - .25 * std::log(.25)), 1e-12);
  EXPECT_EQ(RankOfSpectrum({0, 0}), 0);
  EXPECT_EQ(RankAtEnergy({1, 1, 1, 1}, 1.0), 4);
  EXPECT_EQ(RankAtEnergy({1, 8, 1}, 0.8), 1);
  EXPECT_EQ(RankAtEnergy({1, 8, 1}, 0.85), 2);
  EXPECT_EQ(RankAtEnergy({0, 0}, 0.9), 0);
}

TEST(RankTest, EstimatorsAgreeWithTheSpectrum) {
  const std::vector<float> x = Rows(512, Decaying(64), 7);
  const RowsView view{x, 64};
  const std::vector<double> spectrum = ExactSpectrum(view);
  const double exact = RankOfSpectrum(spectrum);
  double trace = 0;
  for (const double energy : spectrum) trace += energy;
  EXPECT_NEAR(StableRankByPower(view, 60, 1).rank, trace / spectrum[0], 0.05);
  EXPECT_GE(StableRankByPower(view, 3, 1).rank, trace / spectrum[0] - 1e-6)
      << "fewer iterations see less of the largest singular value";
  const RankEstimate svd = RankByRandomizedSvd(view, 24, 2, 1);
  EXPECT_NEAR(svd.rank, exact, 0.02 * exact);
  EXPECT_LE(svd.low, exact);
  int covered = 0;
  double sum = 0;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    const RankEstimate trace_estimate = RankByHutchinson(view, 16, 16, seed);
    sum += trace_estimate.rank / 50;
    covered += trace_estimate.low <= exact && exact <= trace_estimate.high ? 1 : 0;
  }
  EXPECT_NEAR(sum, exact, 0.03 * exact);
  EXPECT_GE(covered, 42) << "of nominal .95";
}

TEST(RankTest, MoreProbesNarrowTheInterval) {
  const std::vector<float> x = Rows(512, Decaying(64), 7);
  const RowsView view{x, 64};
  const RankEstimate few = RankByHutchinson(view, 8, 16, 3),
                     many = RankByHutchinson(view, 128, 16, 3);
  EXPECT_LT(many.high - many.low, 0.6 * (few.high - few.low));
}

// Each of the four estimators on what is degenerate.
void ExpectRank(const std::vector<float>& x, int32_t dim, double rank) {
  const RowsView view{x, dim};
  const double tolerance = 0.02 * rank + 1e-9;
  EXPECT_NEAR(RankOfSpectrum(ExactSpectrum(view)), rank, tolerance);
  EXPECT_NEAR(RankByRandomizedSvd(view, 8, 2, 1).rank, rank, tolerance);
  EXPECT_NEAR(RankByHutchinson(view, 64, 16, 1).rank, rank, 0.15 * rank);
  EXPECT_NEAR(StableRankByPower(view, 50, 1).rank, rank, tolerance);
}

TEST(RankTest, IdenticalKeysHaveOneDirection) {
  std::vector<float> x;
  for (int i = 0; i < 100; ++i) {
    for (int c = 0; c < 32; ++c) x.push_back(0.1f * static_cast<float>(c) - 1);
  }
  ExpectRank(x, 32, 1);
}

TEST(RankTest, ConstantKeysLessTheirMeanHaveNone) {
  ExpectRank(std::vector<float>(64 * 32, 0.0f), 32, 0);
  ExpectRank({}, 32, 0);
}

TEST(RankTest, OneGiantChannelIsOneDirection) {
  std::vector<double> scales(32, 1.0);
  scales[5] = 1e5;
  ExpectRank(Rows(256, scales, 3), 32, 1);
}

TEST(RankTest, FewerRowsThanChannelsLeaveASingularCovariance) {
  std::vector<float> x(4 * 32, 0.0f);
  for (size_t i = 0; i < 4; ++i) x[i * 32 + i] = 1;
  ExpectRank(x, 32, 4);
}

}  // namespace
}  // namespace adaattn

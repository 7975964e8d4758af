// What values were seen to err by, against what the error model says of them.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/format/nested_code.h"
#include "kernels/format/seal.h"
#include "kernels/policy/error_model.h"
#include "kernels/policy/value_factors.h"
#include "tests/unit/format_testing.h"

namespace adaattn {
namespace {

constexpr int32_t kDim = 64;
constexpr int64_t kPages = 9;
constexpr int64_t kTokens = kPages * kPageTokens;

struct Rows {
  int32_t group_size = 1;
  std::vector<float> keys = RandomNormal(1, kTokens* kDim);
  std::vector<float> values = RandomNormal(2, kTokens* kDim);
  std::vector<float> queries = RandomNormal(3, 40 * kDim, 2.0f);

  ValueFactors Measure(float softcap = 0) const {
    return MeasureValueFactors({kDim, group_size, 0.125f, softcap, keys, values, queries});
  }
  // Every 16th token is the same one, which the queries look for.
  void RepeatOneToken() {
    for (int64_t t = 5; t < kTokens; t += 16) {
      for (int32_t c = 0; c < kDim; ++c) {
        keys[t * kDim + c] = 0.8f * queries[c];
        values[t * kDim + c] = 1.2f * std::sin(static_cast<float>(c * c));
      }
    }
    for (size_t i = kDim; i < queries.size(); ++i) queries[i] = queries[i % kDim];
  }
};

// The same figures page by page from pages as they are sealed, in double precision.
ValueFactors ByTheSealedPages(const Rows& rows, float softcap) {
  const AttentionShape shape{1, 1, kDim};
  const std::vector<std::byte> block = FittedBlock(shape, rows.keys);
  const SealedHead head = MakeSealedHead(shape, 0, 8, TileOrder::kLanes);
  std::vector<std::byte> page(static_cast<size_t>(head.layout.page_bytes));
  const size_t num_queries = rows.queries.size() / kDim;
  double lost_ratio = 0, rounded_ratio = 0;
  for (size_t q = 0; q < num_queries; ++q) {
    std::vector<double> lost(kDim), rounded(kDim);
    double square = 0, amplitude = 0, rounding = 0;
    for (int64_t p = 1; p < kPages; ++p) {
      const float* keys = rows.keys.data() + p * kPageTokens * kDim;
      const float* values = rows.values.data() + p * kPageTokens * kDim;
      SealHead(head, ViewBasis(block.data(), shape, 0), keys, values, page.data());
      std::vector<float> coded(kPageTokens * kDim);
      DecodeValues(head, page.data(), 2, coded.data());
      std::vector<double> weights, mean(kDim);
      double sum = 0, square_sum = 0, spread2 = 0;
      for (int32_t t = 0; t < kPageTokens; ++t) {
        double score = 0;
        for (int32_t c = 0; c < kDim; ++c) {
          score += 0.125 * rows.queries[q * kDim + c] * keys[t * kDim + c];
          mean[c] += values[t * kDim + c] / double{kPageTokens};
        }
        if (softcap > 0) score = softcap * std::tanh(score / softcap);
        weights.push_back(std::exp(score));
        sum += weights.back();
      }
      for (int32_t t = 0; t < kPageTokens; ++t) {
        const double share = weights[t] / sum;
        square_sum += share * share;
        for (int32_t c = 0; c < kDim; ++c) {
          const double off = values[t * kDim + c] - mean[c];
          spread2 += off * off / kPageTokens;
          lost[c] += share * off;
          rounded[c] += share * (double{coded[t * kDim + c]} - values[t * kDim + c]);
        }
      }
      const ValueSummary summary = ReadValueSummary(head, page.data());
      square += spread2 * square_sum;
      amplitude += std::sqrt(spread2 * square_sum);
      rounding += square_sum * kDim * summary.scale_rms * summary.scale_rms * CodeVariance(1, 2);
    }
    double lost2 = 0, rounded2 = 0;
    for (int32_t c = 0; c < kDim; ++c) {
      lost2 += lost[c] * lost[c];
      rounded2 += rounded[c] * rounded[c];
    }
    lost_ratio += lost2 / (square + kCoherence * amplitude * amplitude) / num_queries;
    rounded_ratio += rounded2 / rounding / num_queries;
  }
  return {static_cast<float>(std::sqrt(lost_ratio)),
          std::max(1.0f, static_cast<float>(std::sqrt(rounded_ratio)))};
}

TEST(ValueFactorsTest, AreWhatSealedPagesErrBy) {
  Rows plain, repeated;
  repeated.RepeatOneToken();
  for (const Rows* rows : {&plain, &repeated}) {
    for (const float softcap : {0.0f, 2.0f}) {
      const ValueFactors actual = rows->Measure(softcap);
      const ValueFactors expected = ByTheSealedPages(*rows, softcap);
      EXPECT_NEAR(actual.spread, expected.spread, 2e-3 * expected.spread) << softcap;
      EXPECT_NEAR(actual.rounding, expected.rounding, 2e-3 * expected.rounding) << softcap;
    }
  }
}

TEST(ValueFactorsTest, IndependentValuesLoseLessThanTheModelSays) {
  // Eight pages: a square of 1 in 1 + 8 * kCoherence.
  EXPECT_NEAR(Rows().Measure().spread, 1 / std::sqrt(1 + 8 * kCoherence), 0.06);
  EXPECT_NEAR(Rows().Measure().rounding, 1, 0.1);
}

TEST(ValueFactorsTest, ATokenThatComesBackAddsUp) {
  Rows rows;
  rows.RepeatOneToken();
  const ValueFactors factors = rows.Measure();
  EXPECT_GT(factors.spread, 1.8f);
  EXPECT_GT(factors.rounding, 1.8f);
}

TEST(ValueFactorsTest, DrawsRowsEvenlyAndAllOfTheirHeads) {
  Rows rows;
  rows.group_size = 4;
  rows.queries = RandomNormal(3, 128 * kDim, 2.0f);
  const ValueFactors before = rows.Measure();
  std::vector<float> twice;  // each row of 4 heads
  for (int32_t row = 0; row < 32; ++row) {
    const auto at = rows.queries.begin() + row * 4 * kDim;
    for (int32_t copy = 0; copy < 2; ++copy) twice.insert(twice.end(), at, at + 4 * kDim);
  }
  rows.queries = twice;
  EXPECT_EQ(rows.Measure().spread, before.spread);
  EXPECT_EQ(rows.Measure().rounding, before.rounding);
}

TEST(ValueFactorsTest, AreOneWhereNothingCanBeMeasured) {
  Rows rows;
  rows.queries.clear();
  EXPECT_EQ(rows.Measure().spread, 1);
  EXPECT_EQ(rows.Measure().rounding, 1);
  Rows one_page;
  one_page.keys.resize(kPageTokens * kDim);
  one_page.values.resize(kPageTokens * kDim);
  EXPECT_EQ(one_page.Measure().spread, 1);
  Rows zero;
  std::fill(zero.values.begin(), zero.values.end(), 0.0f);
  EXPECT_EQ(zero.Measure().spread, 1);
}

TEST(ValueFactorsTest, StayFiniteAndWithinTheirRange) {
  Rows giant;  // all of a page's mass on one token, values near FP16's end
  for (float& value : giant.values) value *= 1e4f;
  for (float& query : giant.queries) query *= 1e3f;
  Rows infinite = giant;
  for (float& query : infinite.queries) query = std::numeric_limits<float>::max();
  Rows equal;  // nothing is lost but the last bit
  std::fill(equal.values.begin(), equal.values.end(), 3.0f);
  for (const Rows* rows : {&giant, &infinite, &equal}) {
    const ValueFactors factors = rows->Measure();
    EXPECT_GE(factors.spread, 0.25f);
    EXPECT_LE(factors.spread, 4.0f);
    EXPECT_GE(factors.rounding, 1.0f);
    EXPECT_LE(factors.rounding, 4.0f);
  }
}

}  // namespace
}  // namespace adaattn

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "client/lse_merge.h"

namespace adaattn::client {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Rows {
  std::vector<float> o;
  std::vector<float> lse;
};

// Attention of one row per entry over scores [begin, end), in double.
Rows Reference(const std::vector<std::vector<double>>& scores,
               const std::vector<std::vector<double>>& values, size_t head_dim, size_t begin,
               size_t end) {
  Rows rows;
  for (const std::vector<double>& s : scores) {
    double top = -std::numeric_limits<double>::infinity(), total = 0;
    for (size_t t = begin; t < end; ++t) top = std::max(top, s[t]);
    std::vector<double> sum(head_dim);
    for (size_t t = begin; t < end; ++t) {
      total += std::exp(s[t] - top);
      for (size_t c = 0; c < head_dim; ++c) sum[c] += std::exp(s[t] - top) * values[t][c];
    }
    for (double x : sum) rows.o.push_back(static_cast<float>(end > begin ? x / total : kNan));
    rows.lse.push_back(end > begin ? static_cast<float>(top + std::log(total)) : -kInf);
  }
  return rows;
}

Rows Merge(const std::vector<Rows>& parts, size_t rows, size_t head_dim) {
  std::vector<PartialAttention> views;
  views.reserve(parts.size());
  for (const Rows& part : parts) views.push_back({part.o, part.lse});
  Rows merged{std::vector<float>(rows * head_dim, kNan), std::vector<float>(rows, kNan)};
  MergePartials(views, absl::MakeSpan(merged.o), absl::MakeSpan(merged.lse));
  return merged;
}

TEST(LseMergeTest, PartsOfAnyCutGiveTheWholeWithinFloatRounding) {
  constexpr size_t kRows = 5, kTokens = 97, kHeadDim = 24;
  std::mt19937 random(20260101);
  std::normal_distribution<double> normal;
  for (const double spread : {1.0, 30.0, 3000.0}) {
    std::vector<std::vector<double>> scores(kRows, std::vector<double>(kTokens));
    std::vector<std::vector<double>> values(kTokens, std::vector<double>(kHeadDim));
    for (auto& row : scores) {
      for (double& s : row) s = spread * normal(random);
    }
    for (auto& row : values) {
      for (double& v : row) v = normal(random);
    }
    const Rows whole = Reference(scores, values, kHeadDim, 0, kTokens);
    for (const size_t step : {1, 7, 50, 97}) {
      std::vector<Rows> parts;
      for (size_t begin = 0; begin < kTokens; begin += step) {
        parts.push_back(
            Reference(scores, values, kHeadDim, begin, std::min(kTokens, begin + step)));
      }
      parts.insert(parts.begin() + 1, Reference(scores, values, kHeadDim, 3, 3));  // empty: o NaN
      const Rows merged = Merge(parts, kRows, kHeadDim);
      for (size_t i = 0; i < merged.lse.size(); ++i) {
        EXPECT_NEAR(merged.lse[i], whole.lse[i], 1e-6 * std::max(1.0f, std::abs(whole.lse[i])));
      }
      // Parts are rounded to float: an lse of size L is off by L * 2^-24, and so are the weights.
      const double tolerance = 1e-6 + 4 * spread * 6e-8 * 4;
      for (size_t i = 0; i < merged.o.size(); ++i) {
        EXPECT_NEAR(merged.o[i], whole.o[i], tolerance) << "spread " << spread << " step " << step;
      }
    }
  }
}

TEST(LseMergeTest, NoPartsAndOnlyEmptyPartsGiveZeroAndMinusInfinity) {
  const Rows none = Merge({}, 2, 3);
  const Rows empty{std::vector<float>(6, kNan), {-kInf, -kInf}};
  const Rows both = Merge({empty, empty}, 2, 3);
  for (const Rows& rows : {none, both}) {
    for (float x : rows.o) EXPECT_EQ(x, 0);
    for (float x : rows.lse) EXPECT_EQ(x, -kInf);
  }
}

TEST(LseMergeTest, OnePartIsUnchangedEvenFarFromZero) {
  for (const float lse : {-1e30f, -1000.0f, 0.0f, 88.0f, 1000.0f, 3e38f}) {
    const Rows merged = Merge({{{1.5f, -2.25f}, {lse}}}, 1, 2);
    EXPECT_EQ(merged.lse[0], lse);
    EXPECT_EQ(merged.o[0], 1.5f);
    EXPECT_EQ(merged.o[1], -2.25f);
  }
}

TEST(LseMergeTest, OrderChangesNothingBeyondRounding) {
  const Rows a{{1, 2}, {0.5f}}, b{{-3, 0.25f}, {2.0f}}, c{{7, 7}, {-4.0f}};
  const Rows forward = Merge({a, b, c}, 1, 2), backward = Merge({c, b, a}, 1, 2);
  EXPECT_FLOAT_EQ(forward.lse[0], backward.lse[0]);
  EXPECT_FLOAT_EQ(forward.o[0], backward.o[0]);
  EXPECT_FLOAT_EQ(forward.o[1], backward.o[1]);
}

TEST(LseMergeTest, NanAndPlusInfinityReachTheirRowOnly) {
  const Rows bad{{1, 1, 1}, {kNan, kInf, 0}}, good{{2, 2, 2}, {0, 0, 0}};
  const Rows merged = Merge({good, bad}, 3, 1);
  EXPECT_TRUE(std::isnan(merged.lse[0]) && std::isnan(merged.o[0]));
  EXPECT_TRUE(std::isnan(merged.lse[1]) && std::isnan(merged.o[1]));
  EXPECT_FLOAT_EQ(merged.o[2], 1.5f);
}

TEST(LseMergeTest, TheResultMayReplaceAPart) {
  std::vector<float> o = {1, 5}, lse = {0};
  const std::vector<float> other_o = {3, 9}, other_lse = {0};
  const PartialAttention parts[] = {{o, lse}, {other_o, other_lse}};
  MergePartials(parts, absl::MakeSpan(o), absl::MakeSpan(lse));
  EXPECT_FLOAT_EQ(o[0], 2);
  EXPECT_FLOAT_EQ(o[1], 7);
  EXPECT_FLOAT_EQ(lse[0], std::log(2.0f));
}

}  // namespace
}  // namespace adaattn::client

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/policy/ladder.h"
#include "kernels/reference/attention_f64.h"
#include "kernels/reference/progressive_f64.h"
#include "unit/format_testing.h"

namespace adaattn {
namespace {

using ::testing::Each;

constexpr int32_t kDim = 64;
constexpr int32_t kGroup = 3;

// One kv head: tokens as floats, sealed pages of all whole pages, and steps over them.
class Cache {
 public:
  Cache(std::vector<float> keys, std::vector<float> values, int32_t stored_bits = 8)
      : keys_(std::move(keys)),
        values_(std::move(values)),
        block_(FittedBlock(kShape, keys_)),
        head_(MakeSealedHead(kShape, 0, stored_bits, TileOrder::kMma)) {
    const BasisView basis = ViewBasis(block_.data(), kShape, 0);
    std::vector<std::byte> page(
        static_cast<size_t>(MakePageLayout(kShape, stored_bits).page_bytes));
    for (int64_t p = 0; p < num_tokens() / kPageTokens; ++p) {
      const int64_t at = p * kPageTokens * kDim;
      SealHead(MakeSealedHead(kShape, 0, stored_bits, TileOrder::kMma), basis, keys_.data() + at,
               values_.data() + at, page.data());
      head_.AddPage(basis, page.data());
    }
  }
  int64_t num_tokens() const { return static_cast<int64_t>(keys_.size()) / kDim; }

  // The newest row at the end of the cache, the last `dense` tokens not sealed.
  ProgressiveStepF64 Step(const std::vector<float>& q, int64_t dense) const {
    ProgressiveStepF64 step;
    step.q = q.data();
    step.group_size = kGroup;
    step.q_len = static_cast<int32_t>(q.size()) / (kGroup * kDim);
    step.q_start = num_tokens() - step.q_len;
    step.num_sealed_pages = static_cast<int32_t>((num_tokens() - dense) / kPageTokens);
    step.num_dense_tokens = num_tokens() - int64_t{step.num_sealed_pages} * kPageTokens;
    step.dense_keys = keys_.data() + int64_t{step.num_sealed_pages} * kPageTokens * kDim;
    step.dense_values = values_.data() + int64_t{step.num_sealed_pages} * kPageTokens * kDim;
    step.softmax_scale = 0.125;
    return step;
  }
  ProgressiveResultF64 Run(const ProgressiveStepF64& step) const { return head_.Run(step); }
  AttentionF64Result Exact(const ProgressiveStepF64& step) const {
    AttentionF64Params params;
    params.shape = kShape;
    params.kv_len = num_tokens();
    params.q_len = step.q_len;
    params.q_start = step.q_start;
    params.softmax_scale = step.softmax_scale;
    params.softcap = step.softcap;
    params.window = step.window;
    return AttentionF64(params, step.q, keys_.data(), values_.data());
  }

  static constexpr AttentionShape kShape{kGroup, 1, kDim};

 private:
  std::vector<float> keys_, values_;
  std::vector<std::byte> block_;
  ProgressiveHeadF64 head_;
};
constexpr AttentionShape Cache::kShape;

Cache ModelLikeCache(int64_t tokens, int32_t stored_bits = 8) {
  return Cache(ModelLikeKeys(51, tokens, kDim),
               RandomNormal(52, static_cast<size_t>(tokens * kDim)), stored_bits);
}

std::vector<float> Queries(int32_t rows, float scale = 1.0f) {
  return RandomNormal(53, static_cast<size_t>(rows) * kGroup * kDim, scale);
}

int32_t Sum(const int32_t* counts, int32_t n) { return std::accumulate(counts, counts + n, 0); }

double Bytes(const ProgressiveResultF64& result) {
  return static_cast<double>(result.decision.key_bytes + result.decision.value_bytes);
}

TEST(ProgressiveF64Test, FullDepthIsExactUpToTheCodes) {
  const Cache cache = ModelLikeCache(1000);
  const std::vector<float> q = Queries(1);
  ProgressiveStepF64 step = cache.Step(q, 104);
  step.decision.policy = Policy::kFullDepth;
  const ProgressiveResultF64 result = cache.Run(step);
  const AttentionF64Result exact = cache.Exact(step);
  EXPECT_LT(RelativeError(result.out, exact.out), 0.03);
  EXPECT_GT(RelativeError(result.out, exact.out), 1e-4);  // the codes were used
  for (size_t i = 0; i < exact.lse.size(); ++i) EXPECT_NEAR(result.lse[i], exact.lse[i], 0.03);
  EXPECT_EQ(result.decision.key_pages[KeyDepthIndex(8, 4)], 14);
  EXPECT_EQ(result.decision.value_pages[4], 14);
  EXPECT_EQ(result.decision.dense_tokens, 104);
  EXPECT_EQ(result.decision.basis_bytes, BasisReadBytes(kDim));
  EXPECT_EQ(result.decision.theta, 0.0f);
}

TEST(ProgressiveF64Test, DenseTokensAloneAreExact) {
  const Cache cache = ModelLikeCache(120);
  const std::vector<float> q = Queries(2);
  const ProgressiveStepF64 step = cache.Step(q, 120);
  const ProgressiveResultF64 result = cache.Run(step);
  EXPECT_LT(RelativeError(result.out, cache.Exact(step).out), 1e-12);
  EXPECT_THAT(result.predicted, Each(0.0));
  EXPECT_EQ(result.decision.key_bytes, 120 * kDim * 2);
  EXPECT_EQ(result.decision.basis_bytes, 0);
}

TEST(ProgressiveF64Test, ErrorGrowsAndBytesFallWithTheta) {
  const Cache cache = ModelLikeCache(4096);
  const std::vector<float> q = Queries(1);
  ProgressiveStepF64 step = cache.Step(q, 64);
  const AttentionF64Result exact = cache.Exact(step);
  double last_bytes = std::numeric_limits<double>::infinity();
  for (const float theta : {1e-5f, 0.001f, 0.01f, 0.1f}) {
    step.decision.theta = theta;
    const ProgressiveResultF64 result = cache.Run(step);
    EXPECT_LE(Bytes(result), last_bytes) << theta;
    EXPECT_EQ(result.decision.theta, theta);
    last_bytes = Bytes(result);
    // The prediction tells the error's size, not its bound.
    const double error = RelativeError(result.out, exact.out);
    EXPECT_LT(error, 3.0 * result.decision.predicted_error) << theta;
    EXPECT_GT(error, 0.1 * result.decision.predicted_error) << theta;
  }
}

TEST(ProgressiveF64Test, LowerDepthsShowInErrorAndPrediction) {
  const Cache cache = ModelLikeCache(1024);
  const std::vector<float> q = Queries(1);
  ProgressiveStepF64 step = cache.Step(q, 64);
  step.decision.policy = Policy::kStatic;
  const AttentionF64Result exact = cache.Exact(step);
  double last_error = 0.0;
  float last_predicted = 0.0f;
  for (const int32_t bits : {8, 6, 4}) {
    step.decision.static_key_bits = step.decision.static_value_bits = bits;
    const ProgressiveResultF64 result = cache.Run(step);
    const double error = RelativeError(result.out, exact.out);
    EXPECT_GT(error, last_error) << bits;
    EXPECT_GT(result.decision.predicted_error, last_predicted) << bits;
    EXPECT_EQ(result.decision.value_pages[bits / 2], 15) << "the sink too";
    last_error = error;
    last_predicted = result.decision.predicted_error;
  }
}

TEST(ProgressiveF64Test, TwoStagesLeaveColdPagesAtTheirPrefix) {
  const Cache cache = ModelLikeCache(4096);
  const std::vector<float> q = Queries(1, 3.0f);
  ProgressiveStepF64 step = cache.Step(q, 64);
  step.decision.theta = 0.02f;
  const ProgressiveResultF64 one = cache.Run(step);
  step.decision.coarse_rank = 32;
  const ProgressiveResultF64 two = cache.Run(step);
  EXPECT_GT(two.decision.key_pages[KeyDepthIndex(4, 2)], 0);
  EXPECT_LT(two.decision.key_bytes, one.decision.key_bytes);
  EXPECT_EQ(one.decision.key_pages[KeyDepthIndex(4, 2)], 0);
  for (size_t p = 0; p < two.depths.size(); ++p) {
    if (two.depths[p].key.chunks == 2) {
      EXPECT_EQ(two.depths[p].value_bits, 0);
    }
  }
  EXPECT_EQ(Sum(two.decision.key_pages, kNumKeyDepths), step.num_sealed_pages);
  // An endless margin opens every page: one stage in all but name.
  step.decision.coarse_z = 1e6f;
  EXPECT_EQ(cache.Run(step).out, one.out);
}

TEST(ProgressiveF64Test, AllMassOnOneTokenReadsItsPageAlone) {
  std::vector<float> keys = RandomNormal(54, 1024 * kDim, 0.01f);
  const std::vector<float> values = RandomNormal(55, 1024 * kDim);
  for (int32_t c = 0; c < kDim; ++c) keys[size_t{500} * kDim + static_cast<size_t>(c)] = 3.0f;
  const Cache cache(keys, values);
  const std::vector<float> q(kGroup * kDim, 4.0f);  // its score is 96, all others near 0
  ProgressiveStepF64 step = cache.Step(q, 64);
  const ProgressiveResultF64 result = cache.Run(step);
  EXPECT_EQ(result.decision.value_pages[4], 2);  // its page and the sink
  EXPECT_EQ(result.decision.value_pages[0], 13);
  EXPECT_EQ(result.depths[500 / kPageTokens].value_bits, 8);
  EXPECT_NEAR(result.decision.entropy, 0.0, 1e-6);
  EXPECT_LT(RelativeError(result.out, cache.Exact(step).out), 0.02);
}

TEST(ProgressiveF64Test, FlatAttentionIsServedByMeans) {
  const std::vector<float> values = RandomNormal(56, 2048 * kDim);
  const Cache cache(std::vector<float>(2048 * kDim, 0.5f), values);  // identical keys
  const std::vector<float> q = Queries(1);
  ProgressiveStepF64 step = cache.Step(q, 64);
  step.decision.theta = 1.1f / 32;  // just above every page's share
  const ProgressiveResultF64 result = cache.Run(step);
  EXPECT_EQ(result.decision.value_pages[0], 30);  // all but the sink
  const AttentionF64Result exact = cache.Exact(step);
  EXPECT_LT(RelativeError(result.out, exact.out), 0.1);
  for (size_t i = 0; i < exact.lse.size(); ++i) EXPECT_NEAR(result.lse[i], exact.lse[i], 1e-4);
  // 64 dense tokens as single items, 31 pages of 64 tokens.
  const double entropy = std::log(2048.0) - 31.0 / 32 * std::log(64.0);
  EXPECT_NEAR(result.decision.entropy, entropy, 1e-3);
}

TEST(ProgressiveF64Test, AGiantOutlierChannelDoesNotHideTheOthers) {
  std::vector<float> keys = RandomNormal(57, 1024 * kDim);
  for (size_t t = 0; t < 1024; ++t) keys[t * kDim + 9] = t % 3 == 0 ? 400.0f : -380.0f;
  const Cache cache(keys, RandomNormal(58, 1024 * kDim));
  std::vector<float> q = Queries(1);
  for (size_t head = 0; head < kGroup; ++head) q[head * kDim + 9] = 0.002f;
  ProgressiveStepF64 step = cache.Step(q, 64);
  step.decision.policy = Policy::kFullDepth;
  EXPECT_LT(RelativeError(cache.Run(step).out, cache.Exact(step).out), 0.1);
}

TEST(ProgressiveF64Test, WindowsMaskTokensAndHidePages) {
  const Cache cache = ModelLikeCache(1024);
  const std::vector<float> q = Queries(2);
  ProgressiveStepF64 step = cache.Step(q, 64);
  step.window = 500;  // rows at 1022 and 1023 begin at tokens 523 and 524, inside page 8
  step.decision.theta = 0.5f;
  const ProgressiveResultF64 result = cache.Run(step);
  for (size_t p = 0; p < 8; ++p) {
    EXPECT_EQ(result.depths[p].key.chunks, 0) << "page " << p << " is out of sight, the sink too";
    EXPECT_EQ(result.shares[p], 0.0);
  }
  EXPECT_EQ(result.depths[8].value_bits, 2) << "a cut page keeps its tokens";
  EXPECT_EQ(result.depths[9].value_bits, 0);
  EXPECT_EQ(Sum(result.decision.key_pages, kNumKeyDepths), 7);
  EXPECT_EQ(result.decision.dense_tokens, 64);
  step.decision.policy = Policy::kFullDepth;
  EXPECT_LT(RelativeError(cache.Run(step).out, cache.Exact(step).out), 0.03);
}

TEST(ProgressiveF64Test, RowsSeeOnlyTheirPast) {
  const Cache cache = ModelLikeCache(512);
  const std::vector<float> q = Queries(80);  // the first rows end inside sealed pages
  ProgressiveStepF64 step = cache.Step(q, 64);
  step.decision.policy = Policy::kFullDepth;
  const ProgressiveResultF64 result = cache.Run(step);
  const AttentionF64Result exact = cache.Exact(step);
  EXPECT_LT(RelativeError(result.out, exact.out), 0.03);
  for (size_t i = 0; i < exact.lse.size(); ++i) EXPECT_NEAR(result.lse[i], exact.lse[i], 0.05);
}

TEST(ProgressiveF64Test, SoftCapAppliesAfterTheMeanScore) {
  const Cache cache = ModelLikeCache(512);
  const std::vector<float> q = Queries(1);
  ProgressiveStepF64 step = cache.Step(q, 64);
  step.softcap = 5.0;
  step.decision.policy = Policy::kFullDepth;
  EXPECT_LT(RelativeError(cache.Run(step).out, cache.Exact(step).out), 0.03);
}

TEST(ProgressiveF64Test, EmptyRangesGiveZeroAndNoMass) {
  const Cache cache = ModelLikeCache(256);
  const std::vector<float> q = Queries(1);
  ProgressiveStepF64 step = cache.Step(q, 64);
  step.q_start = 5000;
  step.window = 100;
  const ProgressiveResultF64 result = cache.Run(step);
  EXPECT_THAT(result.out, Each(0.0));
  EXPECT_THAT(result.lse, Each(-std::numeric_limits<double>::infinity()));
  EXPECT_EQ(result.decision.key_bytes + result.decision.value_bytes, 0);
  EXPECT_EQ(result.decision.entropy, 0.0f);
  EXPECT_EQ(result.decision.predicted_error, 0.0f);
}

TEST(ProgressiveF64Test, StoredDepthCapsWhatIsRead) {
  const Cache cache = ModelLikeCache(512, /*stored_bits=*/4);
  const std::vector<float> q = Queries(1);
  ProgressiveStepF64 step = cache.Step(q, 64);
  step.decision.theta = 1e-6f;
  const ProgressiveResultF64 result = cache.Run(step);
  EXPECT_EQ(result.decision.key_pages[KeyDepthIndex(4, 4)], 7);
  EXPECT_EQ(result.decision.value_pages[2], 7);
}

TEST(ProgressiveF64Test, BudgetHoldsItsTargetOnAverage) {
  // Values with something in common: of pure noise, attention leaves little more than rounding.
  std::vector<float> values = RandomNormal(59, 4096 * kDim);
  const std::vector<float> mean = RandomNormal(62, kDim);
  for (size_t i = 0; i < values.size(); ++i) values[i] += mean[i % kDim];
  const Cache cache(ModelLikeKeys(51, 4096, kDim), values);
  double last_bytes = 0.0;
  for (const float target : {0.3f, 0.1f, 0.05f}) {
    double error2 = 0.0, bytes = 0.0;
    constexpr uint32_t kSteps = 6;
    for (uint32_t i = 0; i < kSteps; ++i) {
      const std::vector<float> q = RandomNormal(60 + i, kGroup * kDim);
      ProgressiveStepF64 step = cache.Step(q, 64);
      step.decision.policy = Policy::kBudget;
      step.decision.target_relative_error = target;
      const ProgressiveResultF64 result = cache.Run(step);
      EXPECT_LE(result.decision.predicted_error, 0.7f * target);
      EXPECT_GT(result.decision.theta, 0.0f);
      const double error = RelativeError(result.out, cache.Exact(step).out);
      error2 += error * error / kSteps;
      bytes += Bytes(result);
    }
    EXPECT_LT(std::sqrt(error2), target);
    EXPECT_GT(bytes, last_bytes) << "a tighter budget reads more";
    last_bytes = bytes;
  }
}

TEST(ProgressiveF64Test, BudgetBelowTheCodesFallsBackToFullDepth) {
  const Cache cache = ModelLikeCache(512);
  const std::vector<float> q = Queries(1);
  ProgressiveStepF64 step = cache.Step(q, 64);
  step.decision.policy = Policy::kBudget;
  step.decision.target_relative_error = 1e-5f;
  const ProgressiveResultF64 result = cache.Run(step);
  EXPECT_EQ(result.decision.theta, 0.0f);
  EXPECT_EQ(result.decision.value_pages[4], 7);
  EXPECT_GT(result.decision.predicted_error, 1e-5f);
}

TEST(ProgressiveF64Test, RowsShareTheDeepestRead) {
  const Cache cache = ModelLikeCache(1024);
  const std::vector<float> q = Queries(4);
  ProgressiveStepF64 all = cache.Step(q, 64);
  const ProgressiveResultF64 together = cache.Run(all);
  std::vector<double> share(together.shares.size(), 0.0);
  for (int32_t row = 0; row < 4; ++row) {
    ProgressiveStepF64 one = all;
    one.q = q.data() + int64_t{row} * kGroup * kDim;
    one.q_len = 1;
    one.q_start = all.q_start + row;
    const ProgressiveResultF64 alone = cache.Run(one);
    for (size_t p = 0; p < share.size(); ++p) share[p] = std::max(share[p], alone.shares[p]);
  }
  for (size_t p = 0; p < share.size(); ++p) EXPECT_DOUBLE_EQ(together.shares[p], share[p]);
}

}  // namespace
}  // namespace adaattn

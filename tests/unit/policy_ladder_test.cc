#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/policy/ladder.h"

namespace adaattn {
namespace {

constexpr float kTheta = 0.004f;
constexpr int32_t kDim = 128;  // four rank chunks

PageDepth Depth(const DecisionParams& params, float share, PageFacts facts = {},
                int32_t stored_bits = 8) {
  return LadderDepth(params, kTheta, share, facts, kDim, stored_bits);
}

void ExpectDepth(PageDepth actual, int32_t key_bits, int32_t chunks, int32_t value_bits) {
  EXPECT_EQ(actual.key.bits, key_bits);
  EXPECT_EQ(actual.key.chunks, chunks);
  EXPECT_EQ(actual.value_bits, value_bits);
}

TEST(LadderTest, ValueBitsRiseByTwoForEveryFourfoldShare) {
  EXPECT_EQ(LadderValueBits(0.0f, kTheta), 0);
  for (int32_t step = 0; step < 4; ++step) {
    const float edge = kTheta * std::exp2(2.0f * static_cast<float>(step));
    EXPECT_EQ(LadderValueBits(edge, kTheta), 2 * step) << "at the edge";
    EXPECT_EQ(LadderValueBits(std::nextafter(edge, 1.0f), kTheta), 2 * step + 2) << "above it";
  }
  EXPECT_EQ(LadderValueBits(std::numeric_limits<float>::quiet_NaN(), kTheta), 0);
  EXPECT_EQ(LadderValueBits(1e-30f, 0.0f), 8) << "theta 0 reads whatever has mass";
}

TEST(LadderTest, KeysGetTwoBitsMoreThanValues) {
  const DecisionParams params;
  ExpectDepth(Depth(params, 0.5f * kTheta), 4, 4, 0);
  ExpectDepth(Depth(params, 2.0f * kTheta), 4, 4, 2);
  ExpectDepth(Depth(params, 8.0f * kTheta), 6, 4, 4);
  ExpectDepth(Depth(params, 32.0f * kTheta), 8, 4, 6);
  ExpectDepth(Depth(params, 128.0f * kTheta), 8, 4, 8);
}

TEST(LadderTest, SinkIsReadAtFullDepthWhateverItsShare) {
  const DecisionParams params;
  PageFacts sink;
  sink.sink = true;
  ExpectDepth(Depth(params, 0.0f, sink), 8, 4, 8);
  ExpectDepth(Depth(params, 0.0f, sink, 6), 6, 4, 6);
}

TEST(LadderTest, CutPagesAreNeverReplacedByTheirMean) {
  DecisionParams params;
  params.coarse_rank = 64;
  PageFacts cut;
  cut.cut = true;
  cut.opened = false;  // a cut page counts as opened
  ExpectDepth(Depth(params, 0.0f, cut), 4, 4, 2);
  ExpectDepth(Depth(params, 1.0f, cut), 8, 4, 8);
}

TEST(LadderTest, FloorsRaiseAndStoredBitsCap) {
  DecisionParams params;
  params.floor_value_bits = 4;
  ExpectDepth(Depth(params, 0.0f), 6, 4, 4);
  params.floor_value_bits = 0;
  params.floor_key_bits = 8;
  ExpectDepth(Depth(params, 2.0f * kTheta), 8, 4, 2);
  ExpectDepth(Depth(params, 0.0f), 4, 4, 0);  // a skipped page is not attended
  ExpectDepth(Depth(params, 1.0f, {}, 4), 4, 4, 4);
  ExpectDepth(Depth(params, 32.0f * kTheta, {}, 6), 6, 4, 6);
}

TEST(LadderTest, UnopenedPagesStayAtTheirCoarsePrefix) {
  DecisionParams params;
  params.coarse_rank = 64;
  PageFacts closed;
  closed.opened = false;
  ExpectDepth(Depth(params, 1.0f, closed), 4, 2, 0);
}

TEST(CoarseChunksTest, NeedsTheThresholdPolicyAPartialRankAndLeaveToSkip) {
  DecisionParams params;
  EXPECT_EQ(CoarseChunks(params, kDim), 0);
  params.coarse_rank = 64;
  EXPECT_EQ(CoarseChunks(params, kDim), 2);
  params.coarse_rank = 65;  // rounded up to chunks
  EXPECT_EQ(CoarseChunks(params, kDim), 3);
  params.coarse_rank = 97;  // all of them: nothing to save
  EXPECT_EQ(CoarseChunks(params, kDim), 0);
  params.coarse_rank = 64;
  params.floor_value_bits = 2;
  EXPECT_EQ(CoarseChunks(params, kDim), 0);
  params.floor_value_bits = 0;
  params.policy = Policy::kBudget;
  EXPECT_EQ(CoarseChunks(params, kDim), 0);
}

TEST(OpensPageTest, WeighsTheMarginAgainstTheta) {
  const float lse = 10.0f, edge = lse + std::log(kTheta);
  EXPECT_FALSE(OpensPage(edge - 1.1f, 0.25f, 2.0f, lse, kTheta));
  EXPECT_TRUE(OpensPage(edge - 0.9f, 0.25f, 2.0f, lse, kTheta));
  EXPECT_FALSE(OpensPage(edge - 0.9f, 0.25f, 1.0f, lse, kTheta));
  EXPECT_FALSE(OpensPage(-std::numeric_limits<float>::infinity(), 4.0f, 2.0f, lse, kTheta));
}

TEST(StaticDepthTest, TakesTheCallersDepthRaisedAndCapped) {
  DecisionParams params;
  params.policy = Policy::kStatic;
  params.static_key_bits = 6;
  params.static_value_bits = 2;
  params.static_rank = 50;
  ExpectDepth(StaticDepth(params, kDim, 8), 6, 2, 2);
  params.floor_key_bits = 8;
  params.floor_value_bits = 4;
  ExpectDepth(StaticDepth(params, kDim, 8), 8, 2, 4);
  params.static_rank = 0;
  ExpectDepth(StaticDepth(params, kDim, 4), 4, 4, 4);
}

TEST(FullDepthTest, IsWhatIsStored) {
  ExpectDepth(FullDepth(80, 8), 8, 3, 8);
  ExpectDepth(FullDepth(256, 4), 4, 4, 4);
}

}  // namespace
}  // namespace adaattn

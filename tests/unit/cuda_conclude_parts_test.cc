// Which steps the conclude launch ends, and in how many CTAs: host work that needs no GPU.

#include <gtest/gtest.h>

#include "kernels/cuda/conclude_parts.h"

namespace adaattn {
namespace {

constexpr int32_t kNumSms = 132;
// What an H200 holds of clusters of 2 to 8 CTAs, one a multiprocessor.
constexpr ConcludeClusters kClusters = {0, 0, 66, 39, 30, 22, 17, 15, 15};

ProgressiveParams Step(int32_t num_sequences, int32_t pages, bool head_thetas = false) {
  ProgressiveParams params;
  params.shape = {32, 8, 128};
  params.num_sequences = num_sequences;
  params.max_sealed = pages;
  params.head_thetas = head_thetas;
  params.num_sms = kNumSms;
  params.conclude_pages = 32;
  return params;
}

int32_t Ctas(const ProgressiveParams& params) { return ConcludeCtas(params, kClusters); }

TEST(ConcludeCtasTest, HeadsGetAsManyCtasAsThereIsRoomFor) {
  EXPECT_EQ(Ctas(Step(1, 128)), 8);
  EXPECT_EQ(Ctas(Step(2, 128)), 6) << "15 clusters of 7 or 8 are one too few for 16 heads";
  EXPECT_EQ(Ctas(Step(3, 128)), 4);
  EXPECT_EQ(Ctas(Step(4, 64)), 3);
  EXPECT_EQ(Ctas(Step(8, 64)), 2);
  EXPECT_EQ(Ctas(Step(9, 64)), 0);
  for (int32_t count = 1; count <= 66; ++count) {
    ProgressiveParams params = Step(count, 16);
    params.shape = {4, 1, 128};
    const int32_t ctas = Ctas(params);
    ASSERT_GE(ctas, kMinConcludeCtas) << count;
    EXPECT_GE(kClusters[ctas], count);
    EXPECT_TRUE(ctas == kMaxConcludeCtas || kClusters[ctas + 1] < count) << count;
  }
}

TEST(ConcludeCtasTest, ManyPagesAreSharedOutAmongAllCtas) {
  for (const int32_t count : {1, 2, 3, 4, 8}) {
    const int32_t ctas = Ctas(Step(count, 1));
    for (const bool theta : {false, true}) {
      const int32_t most = ctas * MaxConcludePages(Step(count, 1, theta), ctas);
      EXPECT_LE(most, ctas * kConcludePages);
      EXPECT_EQ(Ctas(Step(count, most, theta)), ctas);
      EXPECT_EQ(Ctas(Step(count, most + 1, theta)), 0);
    }
  }
  EXPECT_EQ(Ctas(Step(1, 512, true)), 8) << "32k tokens under a budget";
  EXPECT_EQ(Ctas(Step(3, 256, true)), 4) << "16k";
  EXPECT_EQ(Ctas(Step(4, 128, true)), 3) << "8k";
  EXPECT_EQ(Ctas(Step(8, 64, true)), 2) << "4k";
  EXPECT_EQ(Ctas(Step(2, 512, true)), 0);
  EXPECT_EQ(Ctas(Step(1, 2048)), 0) << "128k";
}

TEST(ConcludeCtasTest, TheTuningAndThePlanMayGiveLess) {
  ProgressiveParams params = Step(1, 128);
  params.conclude_pages = 0;
  EXPECT_EQ(Ctas(params), 0);
  params.conclude_pages = 1;
  EXPECT_EQ(Ctas(params), 0);
  params.conclude_pages = 2;
  EXPECT_EQ(Ctas(params), 8);
  params.num_sms = 33;  // a quarter of them
  params.conclude_pages = 32;
  params.max_sealed = 64;
  EXPECT_EQ(Ctas(params), 4);
  EXPECT_EQ(ConcludeCtas(params, ConcludeClusters{}), 0) << "a device without clusters";
}

TEST(ConcludePartsTest, EveryColumnHasAPlaceForEachCta) {
  for (const int32_t columns : {kFewColumns, kTileColumns}) {
    for (int32_t ctas = kMinConcludeCtas; ctas <= kMaxConcludeCtas; ++ctas) {
      for (int32_t column = 0; column < columns; ++column) {
        const int32_t last = column / ctas * ctas + ctas - 1;  // of the column's
        EXPECT_LT(last, ConcludeParts(columns)) << columns << " columns, " << ctas << " CTAs";
      }
    }
  }
  EXPECT_EQ(ConcludeParts(kFewColumns), 8);
  EXPECT_EQ(ConcludeParts(kTileColumns), 14) << "two columns each of seven CTAs";
}

TEST(QueryGroupTest, DividesColumnsExactly) {
  for (int32_t size = 1; size <= kMaxColumns; ++size) {
    const QueryGroup group(size);
    for (int32_t column = 0; column <= kMaxColumns; ++column) {
      ASSERT_EQ(group.Row(column), column / size) << column << " / " << size;
      ASSERT_EQ(group.Head(column), column % size) << column << " % " << size;
    }
  }
}

TEST(ConcludesTest, WhatSharedMemoryHolds) {
  EXPECT_TRUE(Concludes(64, 8));
  EXPECT_TRUE(Concludes(128, 8));
  EXPECT_TRUE(Concludes(256, 4));
  EXPECT_FALSE(Concludes(256, 8));
  EXPECT_FALSE(Concludes(128, 9));
  EXPECT_FALSE(Concludes(80, 4)) << "its CTAs have too few warps";
}

}  // namespace
}  // namespace adaattn

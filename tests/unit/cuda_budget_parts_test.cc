// How the theta launch shares a head's pages among CTAs: host work that needs no GPU.

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>

#include "kernels/cuda/budget_parts.h"

namespace adaattn {
namespace {

constexpr int32_t kNumSms = 132;

TEST(BudgetPartsTest, EveryPageHasACta) {
  for (const int32_t ctas : {1, 2, 4, 8}) {
    for (int32_t pages = 0; pages < 700; ++pages) {
      const int32_t part = BudgetPart(pages, ctas);
      EXPECT_EQ(part % kWarpPages, 0);
      EXPECT_GE(part * ctas, pages);
      EXPECT_LT((part - kWarpPages) * ctas, std::max(pages, 1)) << "no larger than it must be";
    }
  }
}

TEST(BudgetPartsTest, ManyHeadsTakeFewerCtasEach) {
  ProgressiveParams params;
  params.num_sms = kNumSms;
  for (const auto& [head_dim, ctas_per_sm] : {std::pair(64, 3), std::pair(64, 2), std::pair(128, 3),
                                              std::pair(128, 2), std::pair(256, 1)}) {
    params.shape = {32, 8, head_dim};
    for (params.num_sequences = 1; params.num_sequences <= 64; params.num_sequences *= 2) {
      for (params.max_sealed = 0; params.max_sealed <= 4096; params.max_sealed += 32) {
        const int32_t ctas = BudgetCtas(params, ctas_per_sm);
        EXPECT_TRUE(ctas == 1 || ctas == 2 || ctas == 4 || ctas == 8);
        const int64_t all = int64_t{8} * params.num_sequences * ctas;
        const bool holds_all = params.max_sealed <= ctas * BudgetBlockPages(head_dim);
        EXPECT_TRUE(holds_all || ctas == kMaxBudgetCtas);
        // A CTA is one too many where half of them held all and the device had no room for more.
        const bool half_holds = params.max_sealed <= ctas / 2 * BudgetBlockPages(head_dim);
        EXPECT_FALSE(ctas > 1 && half_holds && 8 * all > 7 * ctas_per_sm * kNumSms)
            << params.max_sealed;
      }
    }
  }
  params.shape = {32, 8, 128};
  const auto ctas_of = [&params](int32_t num_sequences, int32_t max_sealed,
                                 int32_t ctas_per_sm = 2) {
    params.num_sequences = num_sequences;
    params.max_sealed = max_sealed;
    return BudgetCtas(params, ctas_per_sm);
  };
  EXPECT_EQ(ctas_of(1, 128), 1);
  EXPECT_EQ(ctas_of(1, 512), 4);
  EXPECT_EQ(ctas_of(1, 2048), 8);
  EXPECT_EQ(ctas_of(8, 512), 2);
  EXPECT_EQ(ctas_of(8, 512, 3), 4);
  EXPECT_EQ(ctas_of(64, 128), 1);
  EXPECT_EQ(ctas_of(64, 512), 2);
}

TEST(BudgetPartsTest, FewWarpsTakeAllPagesOfAHeadAtOnce) {
  ProgressiveParams params;
  params.shape = {32, 8, 128};
  params.max_sealed = 64;
  EXPECT_TRUE(FewBudgetWarpsDo(params));
  EXPECT_GE(BudgetBlockPages(128, kFewBudgetWarps), params.max_sealed);
  params.max_sealed = 65;
  EXPECT_FALSE(FewBudgetWarpsDo(params));
  params.max_sealed = 64;
  params.shape = {16, 4, 256};  // more channels than threads
  EXPECT_FALSE(FewBudgetWarpsDo(params));
}

}  // namespace
}  // namespace adaattn

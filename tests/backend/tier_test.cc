// Originals of sealed pages in host memory: what attends, reads, copies and zeroes them.

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "tests/backend/backend_harness.h"

namespace adaattn {
namespace {

constexpr int32_t kSealed = 5;

// A sequence whose first kSealed pages are sealed and have their originals in the tier.
class TierTest : public ::testing::TestWithParam<PageFormat> {
 protected:
  TierTest() : harness_(Options()) {
    if (!harness_.ok() || !harness_.has_tier()) return;
    sequence_ = harness_.NewSequence(400);
    dense_ = sequence_;
    // The pages stay for `dense_`; what sealing would free is not handed out again.
    sequence_.keep_exact = true;
    const PageId basis = harness_.FitBasis(sequence_, kSealed);
    dense_out_ = Attend(&dense_);
    harness_.SealWith(&sequence_, kSealed, basis);
  }
  void SetUp() override {
    ASSERT_TRUE(harness_.ok());
    if (!harness_.has_tier()) GTEST_SKIP() << "the backend has no exact tier";
  }

  static HarnessOptions Options() {
    HarnessOptions options;
    options.shape = {4, 2, 64};
    options.format = GetParam();
    options.num_pages = 48;
    options.num_tier_pages = kSealed + 2;
    return options;
  }
  int64_t PageBytes() const { return DensePageBytes(Options().shape, DenseDType(GetParam())); }

  // The originals and the pages that are not sealed, as mode EXACT and audits have them.
  TestSequence Originals() const {
    TestSequence originals = sequence_;
    std::copy(sequence_.exact_pages.begin(), sequence_.exact_pages.end(), originals.pages.begin());
    originals.num_sealed_pages = 0;
    originals.bases.clear();
    originals.exact_pages.clear();
    return originals;
  }
  std::vector<float> Attend(TestSequence* sequence) {
    StepCase step;
    step.sequence = sequence;
    step.q_len = 2;
    if (q_.empty()) q_ = harness_.RandomRows(2, Options().shape.num_q_heads);
    step.q = q_;
    return harness_.Run({step})[0].out;
  }

  BackendHarness harness_;
  TestSequence sequence_, dense_;
  std::vector<float> q_, dense_out_;
};

TEST_P(TierTest, AttendsOriginalsAsThePagesThatTheyWere) {
  TestSequence originals = Originals();
  EXPECT_EQ(Attend(&originals), dense_out_);
  EXPECT_NE(Attend(&sequence_), dense_out_) << "sealed pages are not the originals";
}

TEST_P(TierTest, ReadsOriginalsBackToTheBit) {
  std::vector<float> k, v;
  harness_.Read(Originals(), 0, 400, &k, &v);
  EXPECT_EQ(k, sequence_.k);
  EXPECT_EQ(v, sequence_.v);
}

TEST_P(TierTest, CopiesAnOriginalBackIntoThePool) {
  TestSequence truncated = Originals();
  truncated.pages[3] = harness_.NewPage();
  ASSERT_TRUE(
      harness_.backend().CopyPage(sequence_.exact_pages[3], truncated.pages[3], PageBytes()).ok());
  EXPECT_EQ(Attend(&truncated), dense_out_);
  // And on into another page of the tier.
  TestSequence forked = Originals();
  forked.pages[3] = harness_.NewTierPage();
  ASSERT_TRUE(harness_.backend().CopyPage(truncated.pages[3], forked.pages[3], PageBytes()).ok());
  EXPECT_EQ(Attend(&forked), dense_out_);
}

TEST_P(TierTest, CopiesInsideTheTier) {
  TestSequence forked = Originals();
  forked.pages[0] = harness_.NewTierPage();
  ASSERT_TRUE(
      harness_.backend().CopyPage(sequence_.exact_pages[0], forked.pages[0], PageBytes()).ok());
  EXPECT_EQ(Attend(&forked), dense_out_);
}

TEST_P(TierTest, ZeroesAPage) {
  ASSERT_TRUE(harness_.backend().ZeroPage(sequence_.exact_pages[1], PageBytes()).ok());
  std::vector<float> k, v;
  harness_.Read(Originals(), 64, 128, &k, &v);
  EXPECT_EQ(k, std::vector<float>(k.size(), 0.0f));
  EXPECT_EQ(v, std::vector<float>(v.size(), 0.0f));
  harness_.Read(Originals(), 128, 192, &k, &v);
  EXPECT_EQ(k,
            std::vector<float>(sequence_.k.begin() + 128 * 128, sequence_.k.begin() + 192 * 128));
}

INSTANTIATE_TEST_SUITE_P(Progressive, TierTest,
                         ::testing::Values(PageFormat::kProgressive, PageFormat::kProgressiveF16),
                         [](const ::testing::TestParamInfo<PageFormat>& info) {
                           return std::string(PageFormatName(info.param));
                         });

TEST(TierCreateTest, SaysHowMuchThereIs) {
  const auto with = MakeTestBackend(1 << 20, 0, 1 << 20);
  const auto without = MakeTestBackend(1 << 20);
  ASSERT_NE(with, nullptr);
  ASSERT_NE(without, nullptr);
  EXPECT_EQ(without->info().exact_tier_bytes, 0);
  EXPECT_EQ(with->info().exact_tier_bytes, 1 << 20);
}

}  // namespace
}  // namespace adaattn

#include <gtest/gtest.h>

#include <limits>

#include "absl/strings/match.h"
#include "tests/unit/engine_fixture.h"

namespace adaattn {
namespace {

class EngineSessionTest : public EngineFixture {
 protected:
  absl::StatusOr<TruncateResult> Truncate(const std::shared_ptr<Session>& session,
                                          int64_t position) {
    return Control(
        [&](SessionControl* control) { return control->Truncate(session.get(), position); });
  }
  absl::StatusOr<std::vector<std::shared_ptr<Session>>> Fork(
      const std::shared_ptr<Session>& session, int32_t count = 1) {
    return Control([&](SessionControl* control) { return control->Fork(*session, count); });
  }
  // Appends value, value + 1, ... without attending.
  void Append(const std::shared_ptr<Session>& session, int64_t position, int32_t count,
              float value) {
    TaskBuilder builder(session);
    builder.Add(session, position, 1, count, 0, value);
    EXPECT_TRUE(Run(std::move(builder))->reply.sequences[0].status.ok());
  }
};

TEST_F(EngineSessionTest, TruncatesAndGrowsAgain) {
  const auto session = Open();
  EXPECT_EQ(AppendOnes(session, 0, 200), 200);
  const auto result = Truncate(session, 70);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->kv_len, 70);
  EXPECT_EQ(result->pages_reopened, 0);
  EXPECT_EQ(engine().page_stats().pages[0], 2);
  EXPECT_EQ(Look(session, 70), 70);
  Append(session, 70, 1, 1000);
  EXPECT_EQ(Look(session, 71), 1070);
  ASSERT_TRUE(Truncate(session, 64).ok());
  EXPECT_EQ(engine().page_stats().pages[0], 1);
  ASSERT_TRUE(Truncate(session, 0).ok());
  EXPECT_EQ(engine().page_stats().total_pages(), 0);
  EXPECT_EQ(AppendOnes(session, 0, 3), 3);
}

TEST_F(EngineSessionTest, ATruncatedStepIsNoReplay) {
  const auto session = Open();
  EXPECT_EQ(AppendOnes(session, 0, 8), 8);
  ASSERT_TRUE(Truncate(session, 4).ok());
  TaskBuilder builder(session);
  builder.Add(session, 0, /*step_id=*/1, 4, 1, 1);
  const auto task = Run(std::move(builder));
  EXPECT_TRUE(absl::IsFailedPrecondition(task->reply.sequences[0].status));
}

TEST_F(EngineSessionTest, TruncatingIntoASealedPageReopensIt) {
  const auto session = Open(PageFormat::kProgressive, 2);
  for (int32_t layer = 0; layer < 2; ++layer) EXPECT_EQ(AppendOnes(session, 0, 320, layer), 320);
  engine().Quiesce();
  EXPECT_EQ(engine().page_stats().pages[1], 8);
  const auto result = Truncate(session, 100);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->pages_reopened, 2);
  EXPECT_EQ(engine().page_stats().pages[1], 2);
  EXPECT_EQ(engine().page_stats().pages[0], 2);
  EXPECT_EQ(Look(session, 100, 0), 100);
  EXPECT_EQ(AppendOnes(session, 100, 156, 0), 256);
  engine().Quiesce();
  EXPECT_EQ(Look(session, 256, 0), 256);
  EXPECT_EQ(backend_->CountCalls("fit"), 2) << "the basis stays";
}

TEST_F(EngineSessionTest, TruncatingAtAPageEndReopensNothing) {
  const auto session = Open(PageFormat::kProgressive);
  EXPECT_EQ(AppendOnes(session, 0, 320), 320);
  engine().Quiesce();
  const auto result = Truncate(session, 128);
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(result->pages_reopened, 0);
  EXPECT_EQ(AppendOnes(session, 128, 1), 129);
}

TEST_F(EngineSessionTest, TheExactTierReopensWithoutDecoding) {
  SessionConfig config = TestConfig(PageFormat::kProgressive);
  config.exact_tier = ExactTier::kPool;
  const auto session = Open(config);
  EXPECT_EQ(AppendOnes(session, 0, 320), 320);
  engine().Quiesce();
  const auto result = Truncate(session, 100);
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(result->pages_reopened, 0);
  EXPECT_EQ(backend_->CountCalls("reopen"), 0);
  EXPECT_EQ(Look(session, 100), 100);
  EXPECT_EQ(AppendOnes(session, 100, 1), 101);
}

TEST_F(EngineSessionTest, TruncateNeedsEqualLengthsAndAPositionInside) {
  const auto session = Open(PageFormat::kBf16, 2);
  EXPECT_EQ(AppendOnes(session, 0, 5, 1), 5);
  const absl::Status unequal = Truncate(session, 0).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(unequal));
  EXPECT_TRUE(absl::StrContains(unequal.message(), "layer 0 has 0 tokens, layer 1 has 5"))
      << unequal;
  EXPECT_TRUE(absl::IsFailedPrecondition(Fork(session).status()));
  EXPECT_EQ(AppendOnes(session, 0, 5, 0), 5);
  const absl::Status outside = Truncate(session, 6).status();
  EXPECT_TRUE(absl::IsInvalidArgument(outside));
  EXPECT_TRUE(absl::StrContains(outside.message(), "6 is not in [0, 5]")) << outside;
}

TEST_F(EngineSessionTest, AFailedReopenChangesNothing) {
  pool_bytes_ = 16 * 32768;
  const auto session = Open(PageFormat::kProgressive);
  EXPECT_EQ(AppendOnes(session, 0, 320), 320);
  engine().Quiesce();
  const auto hog = Open();
  int64_t length = 0;
  while (true) {
    TaskBuilder builder(hog);
    builder.Add(hog, length, static_cast<uint64_t>(length) + 1, 64, 0, 1);
    if (!Run(std::move(builder))->reply.sequences[0].status.ok()) break;
    length += 64;
  }
  const absl::Status full = Truncate(session, 100).status();
  EXPECT_TRUE(absl::IsResourceExhausted(full)) << full;
  EXPECT_EQ(Look(session, 320), 320);
}

TEST_F(EngineSessionTest, BranchesShareUntilTheyWrite) {
  const auto session = Open();
  Append(session, 0, 100, 1);
  const float base = 5050;  // 1 + 2 + ... + 100
  const auto forked = Fork(session, 2);
  ASSERT_TRUE(forked.ok()) << forked.status();
  ASSERT_EQ(forked->size(), 2u);
  EXPECT_EQ(engine().page_stats().pages[0], 2) << "nothing is copied yet";
  const auto left = (*forked)[0], right = (*forked)[1];
  EXPECT_NE(left->id(), right->id());
  Append(left, 100, 1, 1000);
  Append(right, 100, 2, 5000);
  EXPECT_EQ(engine().page_stats().pages[0], 4);
  Append(session, 100, 1, 7);
  EXPECT_EQ(engine().page_stats().pages[0], 4) << "the last owner writes in place";
  EXPECT_EQ(Look(left, 101), base + 1000);
  EXPECT_EQ(Look(right, 102), base + 5000 + 5001);
  EXPECT_EQ(Look(session, 101), base + 7);
}

TEST_F(EngineSessionTest, ARefusedWriteLeavesTheSharedPage) {
  const auto session = Open();
  Append(session, 0, 10, 1);
  const auto branch = Fork(session)->front();
  TaskBuilder builder(branch);
  builder.Add(branch, 10, 2, 1, 1, std::numeric_limits<float>::quiet_NaN());
  EXPECT_TRUE(absl::IsInvalidArgument(Run(std::move(builder))->reply.sequences[0].status));
  EXPECT_EQ(engine().page_stats().pages[0], 1);
  EXPECT_EQ(Look(branch, 10), 55);
  EXPECT_EQ(Look(session, 10), 55);
}

TEST_F(EngineSessionTest, ABranchTruncatedIntoASharedFullPageCopiesIt) {
  const auto session = Open();
  Append(session, 0, 128, 1);
  const float base = 8256;  // 1 + 2 + ... + 128
  const auto branch = Fork(session)->front();
  ASSERT_TRUE(Truncate(branch, 100).ok());
  Append(branch, 100, 1, 9999);
  EXPECT_EQ(Look(session, 128), base);
  EXPECT_EQ(Look(branch, 101), 100 * 101 / 2 + 9999);
}

TEST_F(EngineSessionTest, BranchesOfSealedSessionsOutliveTheirParent) {
  const auto session = Open(PageFormat::kProgressive);
  EXPECT_EQ(AppendOnes(session, 0, 320), 320);
  engine().Quiesce();
  const auto branch = Fork(session)->front();
  ASSERT_TRUE(Control([&](SessionControl* control) {
                return control->Close(session->id(), session->epoch(), "tenant-a");
              }).ok());
  EXPECT_EQ(AppendOnes(branch, 320, 64), 384);
  engine().Quiesce();
  EXPECT_EQ(Look(branch, 384), 384);
}

TEST_F(EngineSessionTest, ForkIsAllOrNothing) {
  const auto session = Open();
  Append(session, 0, 10, 1);
  for (int i = 0; i < 1020; ++i) Open();
  const int64_t before = table_.size();
  const absl::Status full = Fork(session, 64).status();
  EXPECT_TRUE(absl::IsResourceExhausted(full)) << full;
  EXPECT_EQ(table_.size(), before);
  Append(session, 10, 1, 1);
  EXPECT_EQ(backend_->CountCalls("copy"), 0) << "no branch holds the page";
}

TEST_F(EngineSessionTest, ExportsTokensAsTheyAre) {
  const auto session = Open(PageFormat::kProgressive);
  Append(session, 0, 300, 1);
  engine().Quiesce();
  std::vector<float> k(10 * 64), v(10 * 64);
  ASSERT_TRUE(Control([&](SessionControl* control) {
                return control->Export(*session, 0, 120, 130, absl::MakeSpan(k), absl::MakeSpan(v));
              }).ok());
  for (int i = 0; i < 10; ++i) EXPECT_EQ(k[i * 64], 121 + i);
  const absl::Status outside = Control([&](SessionControl* control) {
    return control->Export(*session, 0, 120, 301, absl::MakeSpan(k), absl::MakeSpan(v));
  });
  EXPECT_TRUE(absl::IsInvalidArgument(outside)) << outside;
}

TEST_F(EngineSessionTest, ExpiredSessionsLoseTheirPages) {
  const auto session = Open();
  EXPECT_EQ(AppendOnes(session, 0, 100), 100);
  clock_.Advance(absl::Seconds(61));
  const auto other = Open();
  EXPECT_EQ(AppendOnes(other, 0, 1), 1);  // A batch passes, and with it a tick.
  engine().Quiesce();
  EXPECT_TRUE(session->closed());
  EXPECT_EQ(observer_.expired, 1);
  EXPECT_EQ(engine().page_stats().pages[0], 1);
}

TEST_F(EngineSessionTest, AnotherTenantGetsZeroedPages) {
  pool_bytes_ = 4 * 32768;
  const auto session = Open();
  EXPECT_EQ(AppendOnes(session, 0, 256), 256);
  ASSERT_TRUE(Control([&](SessionControl* control) {
                return control->Close(session->id(), session->epoch(), "tenant-a");
              }).ok());
  EXPECT_EQ(backend_->CountCalls("zero"), 0);
  SessionConfig config = TestConfig(PageFormat::kBf16);
  config.tenant = "tenant-b";
  const auto other = Open(config);
  EXPECT_EQ(AppendOnes(other, 0, 65), 65);
  EXPECT_EQ(backend_->CountCalls("zero"), 2);
}

}  // namespace
}  // namespace adaattn

// Sessions whose BF16 originals lie in the exact tier, in host memory.

#include <gtest/gtest.h>

#include "absl/strings/match.h"
#include "kernels/policy/feedback.h"
#include "tests/unit/engine_fixture.h"

namespace adaattn {
namespace {

constexpr int64_t kPageBytes = 16384;  // a BF16 page of the test shape

class EngineTierTest : public EngineFixture {
 protected:
  EngineTierTest() { tier_bytes_ = 32 * kPageBytes; }

  std::shared_ptr<Session> OpenTiered(const std::string& tenant = "tenant-a") {
    SessionConfig config = TestConfig(PageFormat::kProgressive);
    config.exact_tier = ExactTier::kHost;
    config.tenant = tenant;
    return Open(config);
  }
  // Appends up to `length` tokens of value 1 and waits until nothing is left to seal.
  void Fill(const std::shared_ptr<Session>& session, int32_t length) {
    EXPECT_EQ(AppendOnes(session, 0, length), length);
    engine().Quiesce();
  }
  float Attend(const std::shared_ptr<Session>& session, int64_t position, AttendMode mode) {
    TaskBuilder builder(session);
    builder.Add(session, position, 0, 0, 1, 0);
    builder->options.mode = mode;
    const auto task = Run(std::move(builder));
    EXPECT_TRUE(task->reply.sequences[0].status.ok()) << task->reply.sequences[0].status;
    return task->reply.sequences[0].status.ok() ? OutAt(*task, 0) : -1;
  }
  void Close(const std::shared_ptr<Session>& session) {
    ASSERT_TRUE(Control([&](SessionControl* control) {
                  return control->Close(session->id(), session->epoch(), session->config().tenant);
                }).ok());
  }
  int64_t tier_pages() { return engine().page_stats().pages[3]; }
};

TEST_F(EngineTierTest, OriginalsMoveToTheTier) {
  const auto session = OpenTiered();
  Fill(session, 320);
  EXPECT_EQ(backend_->CountCalls("keep"), 4);
  EXPECT_EQ(tier_pages(), 4);
  EXPECT_EQ(engine().page_stats().bytes[3], 4 * kPageBytes);
  EXPECT_EQ(engine().page_stats().pages[0], 1) << "the pool keeps the newest page only";
  EXPECT_EQ(Attend(session, 320, AttendMode::kExact), 320);
  EXPECT_EQ(backend_->CountCalls("run bf16"), 1);
  EXPECT_EQ(Attend(session, 320, AttendMode::kStatistical), 320);
  const SessionFacts facts =
      Control([](SessionControl* control) { return control->List("tenant-a", "", 10); }).front();
  EXPECT_EQ(facts.pages_exact, 4);
  EXPECT_EQ(facts.exact_tier_bytes, 4 * kPageBytes);
  EXPECT_LT(facts.bytes, 5 * kPageBytes);
}

TEST_F(EngineTierTest, DeterministicStepsBringTheOriginals) {
  const auto session = OpenTiered();
  Fill(session, 320);
  EXPECT_EQ(Attend(session, 320, AttendMode::kDeterministic), 320);
  EXPECT_TRUE(backend_->decisions().back().bounded);
  EXPECT_EQ(backend_->decisions().back().policy, Policy::kBudget);
  EXPECT_EQ(backend_->exact_pages(), 4);
}

// What a bounded step decides says nothing of theta.
TEST_F(EngineTierTest, FeedbackPassesOverDeterministicSteps) {
  SessionConfig config = TestConfig(PageFormat::kProgressive);
  config.exact_tier = ExactTier::kHost;
  config.default_options.policy = Policy::kFeedback;
  const auto session = Open(config);
  Fill(session, 320);
  for (const AttendMode mode :
       {AttendMode::kStatistical, AttendMode::kStatistical, AttendMode::kDeterministic,
        AttendMode::kDeterministic, AttendMode::kStatistical}) {
    Attend(session, 320, mode);
  }
  const auto before = static_cast<size_t>(backend_->decisions().size()) - 5;
  const auto policy = [&](size_t i) { return backend_->decisions()[before + i].policy; };
  const auto thetas = [&](size_t i) { return backend_->thetas()[before + i]; };
  EXPECT_EQ(policy(1), Policy::kThreshold);
  EXPECT_EQ(policy(2), Policy::kBudget);
  EXPECT_TRUE(thetas(2).empty());
  EXPECT_EQ(policy(4), Policy::kThreshold);
  // The backend's theta is .25 whatever it is told, .125 in bounded steps.
  const std::vector<float> next = {NextTheta(0.25f, 0.5f, 0.05f)};
  EXPECT_EQ(thetas(1), next);
  EXPECT_EQ(thetas(4), next) << "as the second step left it";
}

TEST_F(EngineTierTest, DeterministicNeedsATierBesideSealedPages) {
  const auto session = Open(TestConfig(PageFormat::kProgressive));
  EXPECT_EQ(AppendOnes(session, 0, 320), 320);
  TaskBuilder builder(session);
  builder.Add(session, 320, 0, 0, 1, 0);
  builder->options.mode = AttendMode::kDeterministic;
  const absl::Status status = Run(std::move(builder))->reply.sequences[0].status;
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "DETERMINISTIC")) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "FULL_DEPTH")) << status;
}

TEST_F(EngineTierTest, BoundsAreAuditedAsBounds) {
  options_.audit_share = 1;
  const auto session = OpenTiered();
  Fill(session, 320);
  observer_.audits.clear();
  Attend(session, 320, AttendMode::kDeterministic);
  engine().Quiesce();
  ASSERT_EQ(observer_.audits.size(), 1u);
  EXPECT_TRUE(observer_.audits[0].exact);
  EXPECT_TRUE(observer_.audits[0].predicted.empty());
  EXPECT_EQ(observer_.audits[0].bounds, std::vector<float>({0.25f}));
}

TEST_F(EngineTierTest, TruncatingCopiesTheOriginalBack) {
  const auto session = OpenTiered();
  Fill(session, 320);
  const auto result =
      Control([&](SessionControl* control) { return control->Truncate(session.get(), 100); });
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->pages_reopened, 0) << "nothing was decoded";
  EXPECT_EQ(backend_->CountCalls("reopen"), 0);
  EXPECT_EQ(backend_->CountCalls("copy"), 1);
  EXPECT_EQ(tier_pages(), 1);
  EXPECT_EQ(AppendOnes(session, 100, 156), 256);
  engine().Quiesce();
  EXPECT_EQ(tier_pages(), 3);
  EXPECT_EQ(Attend(session, 256, AttendMode::kExact), 256);
}

TEST_F(EngineTierTest, BranchesShareTheTierUntilTheLastOne) {
  const auto session = OpenTiered();
  Fill(session, 320);
  const auto branches =
      Control([&](SessionControl* control) { return control->Fork(*session, 2); });
  ASSERT_TRUE(branches.ok()) << branches.status();
  EXPECT_EQ(tier_pages(), 4) << "shared";
  EXPECT_EQ(AppendOnes((*branches)[0], 320, 64), 384);
  engine().Quiesce();
  EXPECT_EQ(tier_pages(), 5) << "the branch seals its own copy of the fifth page";
  Close(session);
  EXPECT_EQ(Attend((*branches)[0], 384, AttendMode::kExact), 384);
  EXPECT_EQ(Attend((*branches)[1], 320, AttendMode::kExact), 320);
  Close((*branches)[0]);
  EXPECT_EQ(tier_pages(), 4);
  Close((*branches)[1]);
  EXPECT_EQ(tier_pages(), 0);
}

TEST_F(EngineTierTest, AFullTierLeavesPagesUnsealedAndHarmsNobody) {
  tier_bytes_ = 6 * kPageBytes;
  const auto session = OpenTiered();
  Fill(session, 256);
  EXPECT_EQ(tier_pages(), 3);
  const auto other = OpenTiered();
  Fill(other, 64 * 8);  // 7 pages are due, 3 fit
  EXPECT_EQ(tier_pages(), 6);
  EXPECT_GT(observer_.deferred.load(), 0);
  EXPECT_EQ(Attend(other, 512, AttendMode::kExact), 512);
  EXPECT_EQ(Attend(session, 256, AttendMode::kExact), 256);
  EXPECT_EQ(engine().page_stats().pages[1], 6) << "no sealed page without its original";
  Close(session);
  EXPECT_EQ(AppendOnes(other, 512, 1), 513);
  engine().Quiesce();
  EXPECT_EQ(tier_pages(), 6) << "room was made and taken";
  EXPECT_EQ(Attend(other, 513, AttendMode::kExact), 513);
}

TEST_F(EngineTierTest, AFullPoolSaysThatTheTierIsTheReason) {
  tier_bytes_ = 2 * kPageBytes;
  pool_bytes_ = 12 * 32768;
  const auto session = OpenTiered();
  int64_t length = 0;
  absl::Status status;
  for (; status.ok() && length < 64 * 64; length += 64) {
    TaskBuilder builder(session);
    builder.Add(session, length, static_cast<uint64_t>(length) + 1, 64, 0, 1);
    FillOnes(&builder);
    status = Run(std::move(builder))->reply.sequences[0].status;
    engine().Quiesce();  // Sealing keeps up: else the pool may be too full for it first.
  }
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "exact tier")) << status;
  EXPECT_EQ(Attend(session, length - 64, AttendMode::kFullDepth), static_cast<float>(length - 64))
      << "what was answered OK is there";
}

TEST_F(EngineTierTest, AuditsAndExportsReadTheOriginals) {
  options_.audit_share = 1;
  const auto session = OpenTiered();
  Fill(session, 320);
  observer_.audits.clear();
  Attend(session, 320, AttendMode::kStatistical);
  engine().Quiesce();
  ASSERT_EQ(observer_.audits.size(), 1u);
  EXPECT_TRUE(observer_.audits[0].exact);
  std::vector<float> k(320 * 64), v(320 * 64);
  const absl::Status status = Control([&](SessionControl* control) {
    return control->Export(*session, 0, 0, 320, absl::MakeSpan(k), absl::MakeSpan(v));
  });
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(k[0], 1);
  EXPECT_EQ(backend_->CountCalls("read bf16 0"), 1) << "no sealed page is read";
}

TEST_F(EngineTierTest, AnotherTenantGetsZeroedTierPages) {
  tier_bytes_ = 4 * kPageBytes;
  const auto session = OpenTiered();
  Fill(session, 320);
  Close(session);
  const int64_t before = backend_->CountCalls("zero tier");
  EXPECT_EQ(before, 0);
  const auto other = OpenTiered("tenant-b");
  Fill(other, 320);
  EXPECT_EQ(backend_->CountCalls("zero tier"), 4);
  EXPECT_EQ(Attend(other, 320, AttendMode::kExact), 320);
}

}  // namespace
}  // namespace adaattn

#include <gtest/gtest.h>

#include "absl/strings/match.h"
#include "tests/unit/engine_fixture.h"

namespace adaattn {
namespace {

class EngineSealTest : public EngineFixture {
 protected:
  std::shared_ptr<Session> OpenProgressive(ExactTier exact_tier = ExactTier::kNone) {
    SessionConfig config = TestConfig(PageFormat::kProgressive);
    config.exact_tier = exact_tier;
    return Open(config);
  }
  // What List says of the only session.
  SessionFacts Facts() {
    return Control([](SessionControl* control) { return control->List("tenant-a", "", 10); })
        .front();
  }
  std::unique_ptr<AttentionTask> Attend(const std::shared_ptr<Session>& session, int64_t position,
                                        const AttendOptions& attend_options) {
    TaskBuilder builder(session);
    builder.Add(session, position, 0, 0, 1, 0);
    builder->options = attend_options;
    return Run(std::move(builder));
  }
};

TEST_F(EngineSealTest, SealsAPageWhenItsSuccessorIsFull) {
  const auto session = OpenProgressive();
  EXPECT_EQ(AppendOnes(session, 0, 255), 255);
  engine().Quiesce();
  EXPECT_EQ(backend_->CountCalls("fit"), 0) << "fewer than fit_tokens";
  EXPECT_EQ(AppendOnes(session, 255, 1), 256);
  engine().Quiesce();
  EXPECT_EQ(backend_->CountCalls("fit 4"), 1);
  EXPECT_EQ(backend_->CountCalls("seal"), 3);
  EXPECT_EQ(AppendOnes(session, 256, 63), 319);
  engine().Quiesce();
  EXPECT_EQ(backend_->CountCalls("seal"), 3);
  EXPECT_EQ(AppendOnes(session, 319, 1), 320);
  engine().Quiesce();
  EXPECT_EQ(backend_->CountCalls("seal"), 4);
  EXPECT_EQ(Look(session, 320), 320);
  const SessionFacts facts = Facts();
  EXPECT_EQ(facts.pages_sealed, 4);
  EXPECT_EQ(facts.pages_dense, 1);
  EXPECT_EQ(engine().page_stats().pages[2], 1);
  EXPECT_EQ(observer_.sealed, 4);
}

TEST_F(EngineSealTest, SealsBetweenTheStepsOfASteadyStream) {
  const auto session = OpenProgressive();
  EXPECT_EQ(AppendOnes(session, 0, 256), 256);
  // The clock stands, so no tick comes; which steps leave a moment is the scheduler's affair.
  for (int step = 0; step < 5000 && backend_->CountCalls("seal") < 3; ++step) {
    EXPECT_EQ(Look(session, 256), 256);
  }
  EXPECT_EQ(backend_->CountCalls("seal"), 3);
}

TEST_F(EngineSealTest, TellsWhenNothingOfASessionIsDue) {
  const auto session = OpenProgressive();
  EXPECT_EQ(AppendOnes(session, 0, 640), 640);
  Mailbox<absl::Status> answer;
  const auto wait = [&](const CancelFlag& cancelled) {
    engine().Post([&, cancelled] {
      engine().WhenSealed(session, cancelled,
                          [&](const absl::Status& status) { answer.Put(status); });
    });
    return answer.Take();
  };
  EXPECT_TRUE(wait(nullptr).ok());
  EXPECT_EQ(backend_->CountCalls("seal"), 9);
  EXPECT_TRUE(wait(nullptr).ok()) << "nothing was due";
}

TEST_F(EngineSealTest, WaitersForSealingLearnThatTheirCallerLeftOrTheDevice) {
  const auto session = OpenProgressive();
  EXPECT_EQ(AppendOnes(session, 0, 100), 100);
  engine().Quiesce();
  Mailbox<absl::Status> answer;
  const auto put = [&](const absl::Status& status) { answer.Put(status); };
  const auto gone = std::make_shared<std::atomic<bool>>(true);
  engine().Post([&] { engine().WhenSealed(session, gone, put); });
  EXPECT_TRUE(absl::IsCancelled(answer.Take()));
  engine().Post([&] { backend_->set_run_status(absl::UnavailableError("lost")); });
  TaskBuilder builder(session);
  builder.Add(session, 100, 2, 1, 0, 1);
  EXPECT_TRUE(absl::IsUnavailable(Run(std::move(builder))->reply.status));
  EXPECT_TRUE(absl::IsUnavailable(lost_.Take()));
  engine().Post([&] { engine().WhenSealed(session, nullptr, put); });
  EXPECT_TRUE(absl::IsUnavailable(answer.Take()));
}

TEST_F(EngineSealTest, FitsWithASampleOfTheQueries) {
  const auto session = OpenProgressive();
  ASSERT_TRUE(Control([&](SessionControl* control) {
                return control->AddQuerySample(session.get(), 0, std::vector<float>(7 * 128, 1));
              }).ok());
  EXPECT_EQ(AppendOnes(session, 0, 200), 200);
  EXPECT_EQ(AppendOnes(session, 200, 56), 256);
  engine().Quiesce();
  EXPECT_EQ(backend_->fit_rows(), 7 + 2);
}

TEST_F(EngineSealTest, QuerySamplesAreBounded) {
  const auto session = OpenProgressive();
  ASSERT_TRUE(Control([&](SessionControl* control) {
                return control->AddQuerySample(session.get(), 0, std::vector<float>(1000 * 128, 1));
              }).ok());
  EXPECT_EQ(AppendOnes(session, 0, 256), 256);
  engine().Quiesce();
  EXPECT_EQ(backend_->fit_rows(), QuerySample::kMaxRows);
}

TEST_F(EngineSealTest, ABroughtBasisSealsAtOnce) {
  const auto session = OpenProgressive();
  ASSERT_TRUE(Control([&](SessionControl* control) {
                return control->LoadBasis(session.get(), 0, std::vector<float>(64),
                                          std::vector<float>(64 * 64));
              }).ok());
  EXPECT_EQ(AppendOnes(session, 0, 128), 128);
  engine().Quiesce();
  EXPECT_EQ(backend_->CountCalls("load"), 1);
  EXPECT_EQ(backend_->CountCalls("fit"), 0);
  EXPECT_EQ(backend_->CountCalls("seal"), 1);
  EXPECT_EQ(Look(session, 128), 128);
}

TEST_F(EngineSealTest, AProfileBringsTheBases) {
  auto profile = std::make_shared<ModelProfile>();
  profile->basis_mean.resize(64);
  profile->basis.resize(64 * 64);
  SessionConfig config = TestConfig(PageFormat::kProgressive);
  config.profile = profile;
  const auto session = Open(config);
  EXPECT_EQ(AppendOnes(session, 0, 192), 192);
  engine().Quiesce();
  EXPECT_EQ(backend_->CountCalls("load"), 1);
  EXPECT_EQ(backend_->CountCalls("seal"), 2);
}

TEST_F(EngineSealTest, DriftStartsANewBasis) {
  options_.seal.refit_drift_ratio = 2;
  const auto session = OpenProgressive();
  EXPECT_EQ(AppendOnes(session, 0, 256), 256);
  engine().Quiesce();
  backend_->set_drift_ratio(100);
  EXPECT_EQ(AppendOnes(session, 256, 64), 320);
  engine().Quiesce();
  const int64_t before = backend_->CountCalls("seal");
  EXPECT_EQ(AppendOnes(session, 320, 3 * 64), 512);
  engine().Quiesce();
  EXPECT_EQ(backend_->CountCalls("seal"), before) << "waits for fit_tokens of new keys";
  backend_->set_drift_ratio(1);
  EXPECT_EQ(AppendOnes(session, 512, 64), 576);
  engine().Quiesce();
  EXPECT_EQ(backend_->CountCalls("fit"), 2);
  EXPECT_EQ(backend_->CountCalls("seal"), before + 4);
  EXPECT_EQ(Look(session, 576), 576);
  EXPECT_EQ(engine().page_stats().pages[2], 2);
}

TEST_F(EngineSealTest, SealingMakesRoomInAFullPool) {
  options_.seal.max_backlog_pages = 1 << 20;
  pool_bytes_ = 24 * 32768;  // 44 BF16 pages beside the reserve
  const auto session = OpenProgressive();
  int64_t length = 0;
  for (; length < 64 * 56; length += 128) {
    ASSERT_EQ(AppendOnes(session, length, 128), length + 128);
  }
  EXPECT_EQ(Look(session, length), length);
  engine().Quiesce();
  EXPECT_EQ(Facts().pages_sealed, 55);
}

TEST_F(EngineSealTest, ExactNeedsTheExactTier) {
  AttendOptions exact;
  exact.mode = AttendMode::kExact;
  const auto session = OpenProgressive();
  EXPECT_EQ(AppendOnes(session, 0, 256), 256);
  const auto refused = Attend(session, 256, exact);
  const absl::Status status = refused->reply.sequences[0].status;
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_TRUE(absl::StrContains(status.message(), "FULL_DEPTH")) << status;
}

TEST_F(EngineSealTest, TheExactTierAnswersFromBf16Pages) {
  AttendOptions exact;
  exact.mode = AttendMode::kExact;
  const auto session = OpenProgressive(ExactTier::kPool);
  EXPECT_EQ(AppendOnes(session, 0, 300), 300);
  engine().Quiesce();
  const SessionFacts facts = Facts();
  EXPECT_EQ(facts.pages_sealed, 3);
  EXPECT_EQ(facts.pages_dense, 2);
  EXPECT_EQ(facts.pages_exact, 3);
  EXPECT_EQ(facts.exact_tier_bytes, 0) << "in the pool";
  const auto task = Attend(session, 300, exact);
  ASSERT_TRUE(task->reply.sequences[0].status.ok());
  EXPECT_EQ(OutAt(*task, 0), 300);
  EXPECT_EQ(backend_->CountCalls("run bf16"), 1);
  EXPECT_EQ(task->reply.sequences[0].decision.pages_sealed, 0);
  EXPECT_EQ(Look(session, 300), 300);
}

TEST_F(EngineSealTest, ModesAndOptionsReachTheBackend) {
  SessionConfig config = TestConfig(PageFormat::kProgressive);
  config.default_options.theta = 0.125f;
  config.default_options.policy = Policy::kThreshold;
  const auto session = Open(config);
  Attend(session, 0, {});
  AttendOptions fixed;
  fixed.mode = AttendMode::kStatic;
  fixed.static_value_bits = 2;
  Attend(session, 0, fixed);
  AttendOptions full;
  full.mode = AttendMode::kFullDepth;
  Attend(session, 0, full);
  engine().Quiesce();
  const std::vector<DecisionParams>& decisions = backend_->decisions();
  ASSERT_EQ(decisions.size(), 3u);
  EXPECT_EQ(decisions[0].policy, Policy::kThreshold);
  EXPECT_EQ(decisions[0].theta, 0.125f);
  EXPECT_EQ(decisions[0].coarse_rank, 32);
  EXPECT_EQ(decisions[1].policy, Policy::kStatic);
  EXPECT_EQ(decisions[1].static_value_bits, 2);
  EXPECT_EQ(decisions[2].policy, Policy::kFullDepth);
}

TEST_F(EngineSealTest, SaysWhyNothingWasSaved) {
  const auto session = OpenProgressive();
  EXPECT_EQ(AppendOnes(session, 0, 256), 256);
  engine().Quiesce();
  const auto sealed = Attend(session, 256, {});
  EXPECT_EQ(sealed->reply.sequences[0].decision.fallback, Fallback::kNone);
  EXPECT_EQ(sealed->reply.sequences[0].decision.pages_sealed, 3);
  EXPECT_EQ(sealed->reply.sequences[0].decision.mean_key_bits, 8);
  const auto fresh = OpenProgressive();
  const auto dense = Attend(fresh, 0, {});
  EXPECT_EQ(dense->reply.sequences[0].decision.fallback, Fallback::kNoBasis);
  EXPECT_EQ(dense->reply.sequences[0].decision.mean_key_bits, 16);
}

TEST_F(EngineSealTest, PerHeadDetailBringsTheDecisions) {
  AttendOptions per_head;
  per_head.detail = DecisionDetail::kPerHead;
  const auto session = OpenProgressive();
  EXPECT_EQ(AppendOnes(session, 0, 100), 100);
  const auto task = Attend(session, 100, per_head);
  ASSERT_EQ(task->reply.heads.size(), 1u);
  EXPECT_EQ(task->reply.heads[0].dense_tokens, 100);
  EXPECT_TRUE(Attend(session, 100, {})->reply.heads.empty());
}

TEST_F(EngineSealTest, PerHeadDetailOutlivesAFailedFirstSequence) {
  const auto session = OpenProgressive();
  TaskBuilder builder(session);
  builder.AddFailed(absl::NotFoundError("gone"), 0, 1).Add(session, 0, 1, 70, 1, 1);
  builder->options.detail = DecisionDetail::kPerHead;
  const auto task = Run(std::move(builder));
  EXPECT_EQ(task->reply.detail, DecisionDetail::kPerHead);
  ASSERT_EQ(task->reply.heads.size(), 2u);
  EXPECT_EQ(task->reply.heads[0].dense_tokens, 0);
  EXPECT_EQ(task->reply.heads[1].dense_tokens, 70);
}

TEST_F(EngineSealTest, AuditsAShareOfStatisticalSteps) {
  options_.audit_share = 0.25;
  const auto session = OpenProgressive();
  EXPECT_EQ(AppendOnes(session, 0, 256), 256);
  engine().Quiesce();
  for (int i = 0; i < 8; ++i) Attend(session, 256, {});
  AttendOptions full;
  full.mode = AttendMode::kFullDepth;
  for (int i = 0; i < 8; ++i) Attend(session, 256, full);
  engine().Quiesce();
  ASSERT_EQ(observer_.audits.size(), 2u);
  EXPECT_FALSE(observer_.audits[0].exact);
  EXPECT_EQ(observer_.audits[0].actual, std::vector<float>({0}));
  EXPECT_EQ(observer_.audits[0].predicted, std::vector<float>({0.5f}));
  EXPECT_EQ(backend_->decisions().back().policy, Policy::kFullDepth);
}

TEST_F(EngineSealTest, AuditsUseTheExactTier) {
  options_.audit_share = 1;
  const auto session = OpenProgressive(ExactTier::kPool);
  EXPECT_EQ(AppendOnes(session, 0, 256), 256);
  engine().Quiesce();
  Attend(session, 256, {});
  engine().Quiesce();
  ASSERT_EQ(observer_.audits.size(), 1u);
  EXPECT_TRUE(observer_.audits[0].exact);
}

}  // namespace
}  // namespace adaattn

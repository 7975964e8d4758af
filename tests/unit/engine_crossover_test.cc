// Layers too short for sealed pages to pay stay dense.

#include <gtest/gtest.h>

#include "tests/unit/engine_fixture.h"

namespace adaattn {
namespace {

TEST(TokensToSealTest, KeepsHeadsTimesTokensBetweenTheCrossovers) {
  const SealCrossover crossovers[] = {{8, 32768}, {64, 8192}, {512, SealCrossover::kNever}};
  EXPECT_EQ(TokensToSeal({}, 8), 0) << "nothing was timed";
  EXPECT_EQ(TokensToSeal(crossovers, 8), 32768);
  EXPECT_EQ(TokensToSeal(crossovers, 4), 65536) << "below the first";
  EXPECT_EQ(TokensToSeal(crossovers, 12.5), 20972);
  EXPECT_EQ(TokensToSeal(crossovers, 64), 8192);
  EXPECT_EQ(TokensToSeal(crossovers, 256), 2048);
  EXPECT_EQ(TokensToSeal(crossovers, 512), SealCrossover::kNever);
  EXPECT_EQ(TokensToSeal(crossovers, 4096), SealCrossover::kNever);
}

// Bases are fitted on 256 tokens; sessions have one kv head.
class EngineCrossoverTest : public EngineFixture {
 protected:
  EngineCrossoverTest() { backend().set_seal_crossovers({{1, 1024}}); }

  std::shared_ptr<Session> OpenProgressive() { return Open(TestConfig(PageFormat::kProgressive)); }
  int32_t PagesSealed(const std::shared_ptr<Session>& session) {
    engine().Quiesce();
    return Control([&](SessionControl*) { return session->layers()[0].num_sealed; });
  }
};

TEST_F(EngineCrossoverTest, AShortLayerStaysDense) {
  const auto session = OpenProgressive();
  EXPECT_EQ(AppendOnes(session, 0, 512), 512);
  EXPECT_EQ(AppendOnes(session, 512, 511), 1023);
  EXPECT_EQ(PagesSealed(session), 0);
  EXPECT_EQ(backend_->CountCalls("fit"), 0);
  EXPECT_EQ(observer_.gauges.seal_backlog, 0) << "nothing waits";
  EXPECT_EQ(AppendOnes(session, 1023, 1), 1024);
  EXPECT_EQ(PagesSealed(session), 15);
  EXPECT_EQ(Look(session, 1024), 1024);
}

TEST_F(EngineCrossoverTest, ALayerThatIsSealedGoesOn) {
  const auto session = OpenProgressive();
  EXPECT_EQ(AppendOnes(session, 0, 1024), 1024);
  EXPECT_EQ(PagesSealed(session), 15);
  ASSERT_TRUE(
      Control([&](SessionControl* control) { return control->Truncate(session.get(), 300); }).ok());
  EXPECT_EQ(PagesSealed(session), 4);
  EXPECT_EQ(AppendOnes(session, 300, 100), 400);
  EXPECT_EQ(PagesSealed(session), 5);
}

TEST_F(EngineCrossoverTest, LargerStepsSealShorterLayers) {
  const auto first = OpenProgressive(), second = OpenProgressive(), third = OpenProgressive();
  for (const auto& session : {first, second, third}) {
    EXPECT_EQ(AppendOnes(session, 0, 512), 512);
    EXPECT_EQ(PagesSealed(session), 0);
  }
  // Of three heads 341 tokens do, and 512 once the mean is above two.
  for (int step = 0; step < 30; ++step) {
    TaskBuilder builder(first);
    for (const auto& session : {first, second, third}) builder.Add(session, 512, 0, 0, 1, 0);
    Run(std::move(builder));
  }
  EXPECT_EQ(PagesSealed(first), 0) << "an append is when a layer is looked at";
  EXPECT_EQ(AppendOnes(first, 512, 64), 576);
  EXPECT_EQ(PagesSealed(first), 8);
}

TEST_F(EngineCrossoverTest, WhoeverWaitsForSealedPagesGetsThem) {
  const auto session = OpenProgressive();
  EXPECT_EQ(AppendOnes(session, 0, 512), 512);
  Mailbox<absl::Status> answer;
  engine().Post([&] {
    engine().WhenSealed(session, nullptr, [&](const absl::Status& status) { answer.Put(status); });
  });
  EXPECT_TRUE(answer.Take().ok());
  EXPECT_EQ(PagesSealed(session), 7);
}

TEST_F(EngineCrossoverTest, WaitingOnceHoldsForTheSession) {
  const auto session = OpenProgressive();
  EXPECT_EQ(AppendOnes(session, 0, 64), 64);
  Mailbox<absl::Status> answer;
  engine().Post([&] {
    engine().WhenSealed(session, nullptr, [&](const absl::Status& status) { answer.Put(status); });
  });
  EXPECT_TRUE(answer.Take().ok()) << "nothing is due";
  EXPECT_EQ(AppendOnes(session, 64, 448), 512);
  EXPECT_EQ(PagesSealed(session), 7);
}

TEST_F(EngineCrossoverTest, AFullPoolSealsShortLayersToo) {
  backend_ = nullptr;
  pool_bytes_ = 24 * 32768;  // 44 BF16 pages beside the reserve
  backend().set_seal_crossovers({{1, SealCrossover::kNever}});
  const auto idle = OpenProgressive(), session = OpenProgressive();
  EXPECT_EQ(AppendOnes(idle, 0, 1280), 1280);
  int64_t length = 0;
  for (; length < 64 * 22; length += 128) {
    ASSERT_EQ(AppendOnes(session, length, 128), length + 128);
  }
  EXPECT_EQ(PagesSealed(idle) + PagesSealed(session), 0) << "there was room";
  for (; length < 64 * 36; length += 128) {
    ASSERT_EQ(AppendOnes(session, length, 128), length + 128);
  }
  EXPECT_GT(PagesSealed(idle) + PagesSealed(session), 0);
  EXPECT_EQ(Look(idle, 1280), 1280);
  EXPECT_EQ(Look(session, length), length);
}

TEST_F(EngineCrossoverTest, TheOptionGoesBeforeTheBackend) {
  options_.seal.min_tokens = 0;
  const auto session = OpenProgressive();
  EXPECT_EQ(AppendOnes(session, 0, 256), 256);
  EXPECT_EQ(PagesSealed(session), 3);
}

TEST_F(EngineCrossoverTest, TheOptionHoldsWhereTheBackendHasTimedNothing) {
  options_.seal.min_tokens = 320;
  backend().set_seal_crossovers({});
  const auto session = OpenProgressive();
  EXPECT_EQ(AppendOnes(session, 0, 319), 319);
  EXPECT_EQ(PagesSealed(session), 0);
  EXPECT_EQ(AppendOnes(session, 319, 1), 320);
  EXPECT_EQ(PagesSealed(session), 4);
}

}  // namespace
}  // namespace adaattn

#include <atomic>

#include "client/replay.h"
#include "client/trace.h"
#include "tests/integration/client_fixture.h"

namespace adaattn::client {
namespace {

class ClientReplayTest : public ClientTest {
 protected:
  void SetUp() override {
    auto trace = LoadTrace("data/smollm2-135m-layer15-8k.safetensors");
    ASSERT_TRUE(trace.ok()) << trace.status();
    trace_ = *std::move(trace);
    config_.name = "exact-fp32";
    config_.page_format = PageFormat::kF32;
    config_.max_rows = 2;
    config_.concurrency = 2;
  }

  Trace trace_;
  ReplayConfig config_;
};

TEST_F(ClientReplayTest, AnExactServerMeetsTheExpectedTensors) {
  std::atomic<int> steps{0};
  const auto report = Replay(client_.get(), trace_, "smollm2", config_, [&] { ++steps; });
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(steps, 4);
  EXPECT_EQ(report->steps, 4);
  EXPECT_LE(report->relative_error_mean, 1e-5);
  EXPECT_LE(report->relative_error_p99, 1e-5);
  EXPECT_LE(report->lse_error_max, 1e-4);
  const int64_t tokens = 2 * (int64_t{trace_.positions[0]} + 1 + trace_.positions[1] + 1);
  EXPECT_EQ(report->bytes_bf16, tokens * trace_.shape.num_kv_heads * trace_.shape.head_dim * 4);
  EXPECT_DOUBLE_EQ(report->bytes_fraction, 2);  // FP32
  EXPECT_FALSE(report->has_theta);
  EXPECT_EQ(fake()->num_sessions(), 0u);
}

TEST_F(ClientReplayTest, AWrongAnswerShows) {
  config_.max_rows = 1;
  config_.concurrency = 1;
  trace_.expected_lse[0] += 1;
  for (int c = 0; c < trace_.shape.head_dim; ++c) trace_.expected_o[c] *= 2;  // head 0, row 0
  const auto report = Replay(client_.get(), trace_, "smollm2", config_, nullptr);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_NEAR(report->lse_error_max, 1, 1e-4);
  EXPECT_NEAR(report->relative_error_mean, 0.5 / trace_.shape.num_q_heads, 1e-5);
}

TEST_F(ClientReplayTest, AnErrorSaysWhereItHappened) {
  fake()->AddFault({absl::StatusCode::kInternal, false, true, 0, /*after=*/0});
  config_.max_rows = config_.concurrency = 1;
  fake()->AddFault({absl::StatusCode::kInternal, false, true, 0, /*after=*/0});
  EXPECT_EQ(Replay(client_.get(), trace_, "t", config_, nullptr).status().code(),
            absl::StatusCode::kInternal);
}

TEST_F(ClientReplayTest, LostStreamsAndImportsChangeNoAnswer) {
  config_.concurrency = 1;
  for (const int32_t after : {40, 60, 90}) {
    fake()->AddFault({absl::StatusCode::kUnavailable, true, false, 0, after});
  }
  const auto report = Replay(client_.get(), trace_, "smollm2", config_, nullptr);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_LE(report->relative_error_p99, 1e-5);
}

}  // namespace
}  // namespace adaattn::client

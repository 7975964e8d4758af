#include <gtest/gtest.h>

#include "client/retry.h"

namespace adaattn::client {
namespace {

using absl::StatusCode;

std::optional<absl::Duration> First(RetryRule rule, StatusCode code,
                                    absl::Duration hint = absl::ZeroDuration()) {
  const RetryOptions options;
  return RetryState(options, rule).Next(absl::Status(code, ""), hint);
}

TEST(RetryTest, RepeatableCallsAreRepeatedAfterLossOnly) {
  for (const StatusCode code :
       {StatusCode::kUnavailable, StatusCode::kCancelled, StatusCode::kDeadlineExceeded}) {
    EXPECT_TRUE(First(RetryRule::kRepeatable, code).has_value()) << static_cast<int>(code);
  }
  for (const StatusCode code :
       {StatusCode::kInvalidArgument, StatusCode::kNotFound, StatusCode::kFailedPrecondition,
        StatusCode::kPermissionDenied, StatusCode::kUnimplemented, StatusCode::kInternal,
        StatusCode::kUnknown, StatusCode::kResourceExhausted}) {
    EXPECT_FALSE(First(RetryRule::kRepeatable, code).has_value()) << static_cast<int>(code);
  }
}

TEST(RetryTest, CreatingCallsAreRepeatedOnlyWhenUnavailable) {
  EXPECT_TRUE(First(RetryRule::kCreates, StatusCode::kUnavailable).has_value());
  EXPECT_FALSE(First(RetryRule::kCreates, StatusCode::kCancelled).has_value());
  EXPECT_FALSE(First(RetryRule::kCreates, StatusCode::kDeadlineExceeded).has_value());
}

TEST(RetryTest, AFullServerIsAskedAgainOnlyWhenItSaidWhen) {
  EXPECT_EQ(First(RetryRule::kRepeatable, StatusCode::kResourceExhausted, absl::Seconds(3)),
            absl::Seconds(3));
  EXPECT_FALSE(First(RetryRule::kRepeatable, StatusCode::kResourceExhausted).has_value());
}

TEST(RetryTest, TheHintIsTheShortestWait) {
  EXPECT_EQ(First(RetryRule::kRepeatable, StatusCode::kUnavailable, absl::Hours(1)),
            absl::Hours(1));
  EXPECT_GT(*First(RetryRule::kRepeatable, StatusCode::kUnavailable, absl::Nanoseconds(1)),
            absl::Nanoseconds(1));
}

TEST(RetryTest, WaitsDoubleWithinTheJitterUpToTheLongest) {
  RetryOptions options;
  options.max_attempts = 20;
  options.initial_backoff = absl::Milliseconds(10);
  options.max_backoff = absl::Milliseconds(100);
  options.jitter = 0.25;
  for (int trial = 0; trial < 50; ++trial) {
    RetryState state(options, RetryRule::kRepeatable);
    absl::Duration backoff = options.initial_backoff;
    for (int attempt = 1; attempt < options.max_attempts; ++attempt) {
      const auto wait = state.Next(absl::UnavailableError(""), absl::ZeroDuration());
      ASSERT_TRUE(wait.has_value());
      EXPECT_LE(*wait, backoff);
      EXPECT_GE(*wait, backoff * 0.75 - absl::Nanoseconds(1));
      backoff = std::min(backoff * 2, options.max_backoff);
    }
  }
}

TEST(RetryTest, AttemptsAreBoundedAndCountedAnewAfterReset) {
  RetryOptions options;
  options.max_attempts = 3;
  RetryState state(options, RetryRule::kRepeatable);
  const auto next = [&] { return state.Next(absl::UnavailableError(""), absl::ZeroDuration()); };
  EXPECT_TRUE(next().has_value());
  EXPECT_TRUE(next().has_value());
  EXPECT_FALSE(next().has_value());
  state.Reset();
  EXPECT_TRUE(next().has_value());
}

TEST(RetryTest, OneAttemptMeansNeverAgain) {
  RetryOptions options;
  options.max_attempts = 1;
  RetryState state(options, RetryRule::kRepeatable);
  EXPECT_FALSE(state.Next(absl::UnavailableError(""), absl::ZeroDuration()).has_value());
}

TEST(RetryTest, WaitingUsesTheGivenSleep) {
  RetryOptions options;
  absl::Duration slept;
  options.sleep = [&](absl::Duration wait) { slept += wait; };
  SleepBetween(options, absl::Hours(5));
  EXPECT_EQ(slept, absl::Hours(5));
}

}  // namespace
}  // namespace adaattn::client

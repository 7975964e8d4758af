#include "client/retry.h"

#include <algorithm>

#include "absl/time/clock.h"

namespace adaattn::client {
namespace {

bool MayRepeat(RetryRule rule, const absl::Status& status, absl::Duration hint) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
      return true;
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kDeadlineExceeded:
      return rule == RetryRule::kRepeatable;
    case absl::StatusCode::kResourceExhausted:
      return hint > absl::ZeroDuration();
    default:
      return false;
  }
}

}  // namespace

RetryState::RetryState(const RetryOptions& options, RetryRule rule)
    : options_(options), rule_(rule), backoff_(options.initial_backoff) {}

std::optional<absl::Duration> RetryState::Next(const absl::Status& status, absl::Duration hint) {
  ++attempts_;
  if (attempts_ >= options_.max_attempts || !MayRepeat(rule_, status, hint)) return std::nullopt;
  const double jitter = std::clamp(options_.jitter, 0.0, 1.0);
  const double share = absl::Uniform(absl::IntervalClosed, random_, 1 - jitter, 1.0);
  const absl::Duration wait = std::max(backoff_ * share, hint);
  backoff_ = std::min(backoff_ * options_.multiplier, options_.max_backoff);
  return wait;
}

void RetryState::Reset() {
  attempts_ = 0;
  backoff_ = options_.initial_backoff;
}

void SleepBetween(const RetryOptions& options, absl::Duration wait) {
  if (options.sleep) {
    options.sleep(wait);
  } else {
    absl::SleepFor(wait);
  }
}

}  // namespace adaattn::client

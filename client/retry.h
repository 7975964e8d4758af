#ifndef ADAATTN_CLIENT_RETRY_H_
#define ADAATTN_CLIENT_RETRY_H_

#include <cstdint>
#include <functional>
#include <optional>

#include "absl/random/random.h"
#include "absl/status/status.h"
#include "absl/time/time.h"

namespace adaattn::client {

// How often and how fast a call is asked again.
struct RetryOptions {
  int32_t max_attempts = 5;  // the first included; 1 = never again
  absl::Duration initial_backoff = absl::Milliseconds(20);
  absl::Duration max_backoff = absl::Seconds(2);
  double multiplier = 2;
  double jitter = 0.5;  // a wait is drawn from [1 - jitter, 1] times the backoff
  // Waits between attempts; empty = absl::SleepFor.
  std::function<void(absl::Duration)> sleep;
};

// Which errors a call may be asked again for.
enum class RetryRule {
  // The call may be applied twice without harm: appends by the append-once rule, and whatever is
  // idempotent. Again after UNAVAILABLE, CANCELLED and DEADLINE_EXCEEDED.
  kRepeatable,
  // A second application would leave something behind (a session without an owner until its lease
  // ends). Again after UNAVAILABLE only.
  kCreates,
};

// The waits of one call. RESOURCE_EXHAUSTED is asked again only where the server said when: its
// hint is the shortest wait. Not thread-safe.
class RetryState {
 public:
  // `options` outlives the state.
  RetryState(const RetryOptions& options, RetryRule rule);

  // How long to wait before the next attempt, after one that ended with `status`; nullopt: do not
  // ask again. `hint`: what the server asked to wait, zero = nothing.
  std::optional<absl::Duration> Next(const absl::Status& status, absl::Duration hint);

  // Forgets the attempts so far: something succeeded.
  void Reset();

 private:
  const RetryOptions& options_;
  const RetryRule rule_;
  absl::BitGen random_;
  int32_t attempts_ = 0;
  absl::Duration backoff_;
};

// Waits as `options` says.
void SleepBetween(const RetryOptions& options, absl::Duration wait);

}  // namespace adaattn::client

#endif  // ADAATTN_CLIENT_RETRY_H_

#ifndef ADAATTN_TESTS_UNIT_FAKE_CLOCK_H_
#define ADAATTN_TESTS_UNIT_FAKE_CLOCK_H_

#include <atomic>
#include <cstdint>

#include "absl/time/time.h"
#include "server/clock.h"

namespace adaattn {

// Stands still until told to move. Threads: any.
class FakeClock final : public Clock {
 public:
  absl::Time Now() const override { return absl::FromUnixNanos(now_ns_.load()); }
  void Advance(absl::Duration duration) { now_ns_ += absl::ToInt64Nanoseconds(duration); }

 private:
  std::atomic<int64_t> now_ns_{int64_t{1'800'000'000} * 1'000'000'000};
};

}  // namespace adaattn

#endif  // ADAATTN_TESTS_UNIT_FAKE_CLOCK_H_

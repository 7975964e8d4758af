#ifndef ADAATTN_SERVER_CLOCK_H_
#define ADAATTN_SERVER_CLOCK_H_

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace adaattn {

// What the server takes time from; tests put their own in. Threads: any.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() const = 0;
};

class SystemClock final : public Clock {
 public:
  absl::Time Now() const override { return absl::Now(); }

  static const SystemClock* Get() {
    static const SystemClock* const clock = new SystemClock;
    return clock;
  }
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_CLOCK_H_

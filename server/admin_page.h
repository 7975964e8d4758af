#ifndef ADAATTN_SERVER_ADMIN_PAGE_H_
#define ADAATTN_SERVER_ADMIN_PAGE_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <string>

#include "absl/time/time.h"
#include "kernels/mutex.h"
#include "server/http_server.h"
#include "server/metrics.h"
#include "server/openmetrics.h"

namespace adaattn {

// What /api/live tells: totals, the last ten seconds, the last five minutes second by second, and
// the time since the start in ever longer intervals, made from samples of the metrics that the
// server takes once a second. Threads: any.
class LiveHistory {
 public:
  static constexpr int kCapacity = 300;  // intervals kept of either history
  static constexpr absl::Duration kInterval = absl::Seconds(1);
  static constexpr int kWindow = 10;  // samples of "now"

  // `metrics` outlives the history.
  LiveHistory(const Metrics* metrics, MetricsInfo info, absl::Time start)
      : metrics_(metrics), info_(std::move(info)), start_(start) {}

  void Sample(absl::Time now);
  // A JSON object: server, totals, now, cache, history, since_start.
  std::string Json(absl::Time now, bool ready) const;

  struct Point {
    absl::Time time;
    LiveTotals totals;
  };

 private:
  const Metrics* const metrics_;
  const MetricsInfo info_;
  const absl::Time start_;
  mutable Mutex mutex_;
  std::deque<Point> recent_ ABSL_GUARDED_BY(mutex_);
  // Every stride-th sample; where that becomes too many, every second one goes.
  std::deque<Point> since_start_ ABSL_GUARDED_BY(mutex_);
  int64_t stride_ ABSL_GUARDED_BY(mutex_) = 1;
  int64_t num_samples_ ABSL_GUARDED_BY(mutex_) = 0;
};

// /metrics, /openmetrics (the same with exemplars), /healthz (200 while the process answers),
// /readyz (200 while `ready`, else 503), /api/live, and the live page at / with its two files.
// Everything outlives the server.
std::map<std::string, HttpServer::Handler> AdminHandlers(const Metrics* metrics,
                                                         const LiveHistory* history,
                                                         const Exemplars* exemplars,
                                                         const std::function<bool()>& ready);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_ADMIN_PAGE_H_

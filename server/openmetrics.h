#ifndef ADAATTN_SERVER_OPENMETRICS_H_
#define ADAATTN_SERVER_OPENMETRICS_H_

#include <array>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "kernels/mutex.h"
#include "server/metric_table.h"

namespace adaattn {

// The newest traced call of every bucket of adaattn_request_duration_seconds, and the OpenMetrics
// exposition that shows them: the older text format has no place for exemplars. Threads: any.
class Exemplars {
 public:
  Exemplars();

  void Add(RpcMethod method, absl::Duration latency, absl::string_view trace_id, absl::Time now);

  // The Prometheus text exposition `text` as OpenMetrics 1.0, exemplars behind their buckets.
  std::string OpenMetrics(absl::string_view text) const;

 private:
  struct Exemplar {
    std::string trace_id;  // empty: none
    double seconds = 0;
    double time = 0;  // Unix
  };

  mutable Mutex mutex_;
  // Per method: a cell per bucket, +Inf last.
  std::array<std::vector<Exemplar>, kNumRpcMethods> cells_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_OPENMETRICS_H_

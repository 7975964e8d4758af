#ifndef ADAATTN_LOADTEST_HEAD_STEPS_H_
#define ADAATTN_LOADTEST_HEAD_STEPS_H_

// Head-steps of a trace: what one kv head did in one step, beside what an exact cache answers. The
// unit in which budgets are judged.

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "loadtest/trace_cache.h"

namespace adaattn {

struct HeadStep {
  int32_t row = 0;
  int32_t kv_head = 0;
  // Relative L2 error of the kv head's output over its q heads, as an audit takes it:
  // sqrt(sum |o - exact|^2 / sum |exact|^2).
  double error = 0;
  std::vector<double> q_errors;  // [group_size] of each q head on its own
  HeadDecision decision = {};
};

struct HeadStepSummary {
  double mean_error = 0;    // of HeadStep::error
  double above = 0;         // fraction of head-steps whose error exceeds the target
  double mean_q_error = 0;  // the same two of single q heads
  double q_above = 0;
  double fallbacks = 0;  // fraction of head-steps with theta 0
  double bytes = 0;      // of K and V, as a fraction of a BF16 cache's
};

// A backend with a pool of that many bytes; null where there is none.
using BackendFactory = std::function<std::unique_ptr<Backend>(int64_t pool_bytes)>;

// A trace twice in memory: progressive, and exact over BF16 pages (what an exact tier keeps).
class HeadStepTrace {
 public:
  // `factory` makes a backend of that many bytes, twice. `trace` outlives the result.
  static absl::StatusOr<HeadStepTrace> Make(const Trace* trace, const BackendFactory& factory);

  // Every row with at least two sealed pages, as one batch of decode steps of its own length; under
  // kFeedback one after the other.
  absl::StatusOr<std::vector<HeadStep>> Run(const DecisionParams& decision);

  HeadStepSummary Summarise(const std::vector<HeadStep>& steps, double target) const;

  const Trace& trace() const { return *trace_; }
  TraceCache& cache() { return *cache_; }

 private:
  HeadStepTrace(const Trace* trace, std::unique_ptr<Backend> backend)
      : trace_(trace), backend_(std::move(backend)) {}
  absl::Status Load(Backend* exact);

  const Trace* trace_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<TraceCache> cache_;
  std::vector<int32_t> rows_;
  std::vector<TraceRowResult> exact_;  // of rows_
};

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_HEAD_STEPS_H_

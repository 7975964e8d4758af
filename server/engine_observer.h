#ifndef ADAATTN_SERVER_ENGINE_OBSERVER_H_
#define ADAATTN_SERVER_ENGINE_OBSERVER_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kernels/attention.h"
#include "server/attention_task.h"
#include "server/batcher.h"
#include "server/page_allocator.h"

namespace adaattn {

// One (sequence, layer) of a batch, whether it succeeded or not.
struct StepReport {
  absl::StatusCode code = absl::StatusCode::kOk;
  AttendMode mode = AttendMode::kStatistical;
  Policy policy = Policy::kBudget;  // that chose the depths
  bool attended = false;
  bool replayed = false;
  int32_t q_len = 0;
  int32_t appended = 0;
  int64_t kv_len = 0;                         // after the step
  const DecisionSummary* decision = nullptr;  // set when attended
  absl::Span<const HeadDecision> heads;       // [num_kv_heads]; empty unless attended
};

// What happened in one batch. Spans live until OnBatch returns.
struct BatchReport {
  AttentionShape shape;
  PageFormat format = PageFormat::kBf16;  // of the sessions
  int32_t num_tasks = 0;
  int64_t q_tokens = 0;
  int64_t appended_tokens = 0;
  absl::Span<const StepReport> steps;
  absl::Span<const absl::Duration> queue_times;  // [num_tasks]
  TaskTimes times;                               // queue: the longest
  absl::Duration total;                          // from taking the batch to the last reply
  BatcherLoad load;                              // when it was taken
};

// Sealing work between two batches.
struct SealReport {
  int32_t pages_sealed = 0;
  int32_t bases_fitted = 0;
  int32_t pages_deferred = 0;  // not sealed for want of space in the pool or the exact tier
  std::string deferred_why;    // which, and how much of it; empty unless pages were deferred
  float drift_ratio = 0;       // largest of the sealed pages; 0 when none
  absl::Duration duration;
};

// One (sequence, layer) recomputed.
struct AuditReport {
  bool exact_reference = false;  // the exact tier; else every sealed page at its stored depth
  // Per kv head: relative L2 error over its group's q heads and rows, and what had been said of it:
  // a prediction, or for deterministic steps a bound; the other is empty.
  absl::Span<const float> actual;
  absl::Span<const float> predicted;
  absl::Span<const float> bounds;
};

struct GaugeReport {
  int64_t sessions = 0;
  PageStats pages;
  BatcherLoad load;
  int64_t seal_backlog = 0;  // pages that are due for sealing
};

enum class SessionEvent : uint8_t {
  kOpened = 0,
  kClosed = 1,
  kExpired = 2,
  kForked = 3,
  kTruncated = 4,
  kReopened = 5
};
const char* SessionEventName(SessionEvent event);

// What the engine tells whoever keeps the metrics. Called on the engine thread, one call per batch;
// must not block. The default does nothing.
class EngineObserver {
 public:
  virtual ~EngineObserver() = default;
  virtual void OnBatch(const BatchReport& /*report*/) {}
  virtual void OnSeal(const SealReport& /*report*/) {}
  virtual void OnAudit(const AuditReport& /*report*/) {}
  // After every batch and every idle tick (EngineOptions::tick).
  virtual void OnGauges(const GaugeReport& /*report*/) {}
  // kExpired only; the service counts what it did itself.
  virtual void OnSessionEvent(SessionEvent /*event*/, int64_t /*count*/) {}
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_ENGINE_OBSERVER_H_

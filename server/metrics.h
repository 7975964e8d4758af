#ifndef ADAATTN_SERVER_METRICS_H_
#define ADAATTN_SERVER_METRICS_H_

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "kernels/mutex.h"
#include "server/engine_observer.h"
#include "server/metric_table.h"

namespace adaattn {

struct MetricsInfo {
  std::string version;
  std::string commit;
  std::string compiler;
  std::string backend;  // BackendInfo
  std::string device;
  std::string kernels;
};

// What the live page shows, as sums since the start and the newest gauges.
struct LiveTotals {
  int64_t key_bytes = 0, value_bytes = 0, basis_bytes = 0;
  int64_t bf16_bytes = 0;
  int64_t sequences = 0, failed_sequences = 0, batches = 0;
  int64_t q_tokens = 0, appended_tokens = 0;
  std::array<int64_t, 3> key_pages{};      // read at 4, 6, 8 bits
  std::array<int64_t, 5> value_pages{};    // skipped, then 2, 4, 6, 8 bits
  int64_t dense_tokens = 0;                // (token, kv head) pairs
  std::array<int64_t, 4> rank_quarters{};  // head steps by the quarter of head_dim their rank fills
  std::array<int64_t, kNumFallbacks> fallbacks{};            // by Fallback; [0] counts none
  std::array<std::vector<double>, kNumStages> stage_counts;  // per latency bucket, +Inf last
  std::vector<double> batch_counts;                          // likewise, batch_duration_seconds
  std::vector<double> predicted_error_counts, audited_error_counts;  // likewise, per kv head
  LimitValues limits{};
  int64_t inflight_bytes = 0;
  GaugeReport gauges;
  float drift_ratio = 0;
};

// The registry of MetricTable() and all that feeds it. Batches are summed in plain arrays on the
// engine thread and added to the registry once each.
// Threads: the EngineObserver calls come from the engine's; everything else from any.
class Metrics final : public EngineObserver {
 public:
  explicit Metrics(const MetricsInfo& info);
  ~Metrics() override;
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  // `code` is a gRPC status code.
  void OnRequest(RpcMethod method, int code, absl::Duration latency);
  void OnWire(WireDirection direction, WireTransport transport, int64_t bytes);
  void OnStreams(int delta);
  void OnSpans(bool exported, int64_t count);
  void SetReady(bool ready);
  void SetLimits(const LimitValues& limits);
  // Asked at every scrape; call before the first.
  void SetInflightBytesSource(std::function<int64_t()> source);

  void OnBatch(const BatchReport& report) override;
  void OnSeal(const SealReport& report) override;
  void OnAudit(const AuditReport& report) override;
  void OnGauges(const GaugeReport& report) override;
  void OnSessionEvent(SessionEvent event, int64_t count) override;

  // The Prometheus text exposition.
  std::string Serialize() const;
  LiveTotals totals() const;
  int64_t streams() const;
  int64_t requests() const;         // of all methods and codes
  int64_t failed_requests() const;  // those with a code other than OK

 private:
  struct Handles;
  struct BatchSums;

  void AddHead(const StepReport& step, const HeadDecision& head, int32_t head_dim);
  void AddStages(const BatchReport& report);

  const std::unique_ptr<Handles> handles_;
  const std::unique_ptr<BatchSums> sums_;  // engine thread
  mutable Mutex mutex_;
  LiveTotals totals_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_METRICS_H_

#include "server/metrics.h"

#include <prometheus/text_serializer.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <sstream>
#include <utility>

#include "server/head_sums.h"
#include "server/histogram.h"
#include "server/metric_registry.h"
#include "server/process_stats.h"

namespace adaattn {
namespace {

constexpr int64_t kPrecisions = 4;

int64_t PrecisionIndex(double key_bits) {
  return key_bits > 8 ? 3 : key_bits >= 7 ? 2 : key_bits >= 5 ? 1 : 0;
}

void AddHeadTotals(const HeadDecision& head, const HeadSums& sums, LiveTotals* totals) {
  for (int32_t i = 0; i < kNumKeyDepths; ++i) {
    totals->key_pages[static_cast<size_t>(KeyDepthBits(i) / 2 - 2)] += head.key_pages[i];
  }
  for (size_t i = 0; i < kNumValueDepths; ++i) totals->value_pages[i] += head.value_pages[i];
  totals->value_pages[0] -= head.exact_pages;  // not skipped: their originals were read
  totals->dense_tokens += head.dense_tokens;
  totals->key_bytes += head.key_bytes;
  totals->value_bytes += head.value_bytes;
  totals->basis_bytes += head.basis_bytes;
  if (sums.sealed_pages > 0) ++totals->rank_quarters[static_cast<size_t>(sums.rank_quarter)];
}

// Read at every scrape, not counted: they replace the registry's placeholders.
void FillProcessMetrics(std::vector<prometheus::MetricFamily>* families) {
  const ProcessStats stats = ReadProcessStats();
  const std::map<std::string, double> values = {
      {"process_cpu_seconds_total", stats.cpu_seconds},
      {"process_resident_memory_bytes", static_cast<double>(stats.resident_bytes)},
      {"process_virtual_memory_bytes", static_cast<double>(stats.virtual_bytes)},
      {"process_open_fds", static_cast<double>(stats.open_fds)},
      {"process_threads", static_cast<double>(stats.threads)},
      {"process_start_time_seconds", stats.start_time}};
  for (prometheus::MetricFamily& family : *families) {
    const auto value = values.find(family.name);
    if (value == values.end()) continue;
    family.metric[0].counter.value = value->second;
    family.metric[0].gauge.value = value->second;
  }
}

}  // namespace

// Looked up once; RPC threads and scrapes use them.
struct Metrics::Handles {
  explicit Handles(const MetricsInfo& info)
      : registry({{"adaattn_build_info", {info.version, info.commit, info.compiler}},
                  {"adaattn_device_info", {info.backend, info.device, info.kernels}},
                  {"adaattn_kv_bytes_read_total", {info.backend}}}),
        requests(registry.counters("requests_total")),
        wire_bytes(registry.counters("wire_bytes_total")),
        session_events(registry.counters("session_events_total")),
        audits(registry.counters("audits_total")),
        spans(registry.counters("trace_spans_total")),
        bound_violations(registry.counters("bound_violations_total")[0]),
        pages_sealed(registry.counters("pages_sealed_total")[0]),
        bases_fitted(registry.counters("bases_fitted_total")[0]),
        request_duration(registry.histograms("request_duration_seconds")),
        kv_pages(registry.gauges("kv_pages")),
        kv_bytes(registry.gauges("kv_bytes")),
        limits(registry.gauges("limit")),
        kv_pool_bytes(registry.gauges("kv_pool_bytes")[0]),
        kv_exact_tier_bytes(registry.gauges("kv_exact_tier_bytes")[0]),
        sessions(registry.gauges("sessions")[0]),
        queue_depth(registry.gauges("queue_depth")[0]),
        queue_bytes(registry.gauges("queue_bytes")[0]),
        inflight_bytes(registry.gauges("inflight_bytes")[0]),
        streams(registry.gauges("streams")[0]),
        seal_backlog(registry.gauges("seal_backlog_pages")[0]),
        drift_ratio(registry.gauges("basis_drift_ratio")[0]),
        ready(registry.gauges("ready")[0]) {
    registry.gauges("build_info")[0]->Set(1);
    registry.gauges("device_info")[0]->Set(1);
  }

  using Counter = prometheus::Counter;
  using Gauge = prometheus::Gauge;
  MetricRegistry registry;
  std::vector<Counter*> requests, wire_bytes, session_events, audits, spans;
  Counter *bound_violations, *pages_sealed, *bases_fitted;
  std::vector<prometheus::Histogram*> request_duration;
  std::vector<Gauge*> kv_pages, kv_bytes, limits;
  Gauge *kv_pool_bytes, *kv_exact_tier_bytes, *sessions, *queue_depth, *queue_bytes,
      *inflight_bytes, *streams, *seal_backlog, *drift_ratio, *ready;
  std::function<int64_t()> inflight_bytes_source;
  std::atomic<int64_t> num_requests{0}, num_failed_requests{0}, num_streams{0};
};

struct Metrics::BatchSums {
  explicit BatchSums(const MetricRegistry& r)
      : sequences(r, "sequences_total"),
        attended_tokens(r, "attended_tokens_total"),
        appended_tokens(r, "appended_tokens_total"),
        bytes_read(r, "kv_bytes_read_total"),
        bytes_baseline(r, "kv_bytes_baseline_total"),
        pages_read(r, "pages_read_total"),
        pages_skipped(r, "pages_skipped_total"),
        dense_tokens(r, "dense_tokens_read_total"),
        head_decisions(r, "head_decisions_total"),
        head_policies(r, "head_policies_total"),
        fallbacks(r, "fallbacks_total"),
        key_bits(r, "key_bits"),
        value_bits(r, "value_bits"),
        key_rank(r, "key_rank"),
        entropy(r, "attention_entropy_nats"),
        theta(r, "theta"),
        predicted_error(r, "predicted_relative_error"),
        audited_error(r, "audited_relative_error"),
        audit_ratio(r, "audit_ratio"),
        audit_bound_ratio(r, "audit_ratio", 1),
        error_bound(r, "relative_error_bound"),
        batch_duration(r, "batch_duration_seconds"),
        batch_sequences(r, "batch_sequences"),
        batch_tokens(r, "batch_tokens") {
    for (size_t i = 0; i < kNumStages; ++i) stages.emplace_back(r, "stage_duration_seconds", i);
  }

  void Flush() {
    for (BatchCounters* counters :
         {&sequences, &attended_tokens, &appended_tokens, &bytes_read, &bytes_baseline, &pages_read,
          &pages_skipped, &dense_tokens, &head_decisions, &head_policies, &fallbacks}) {
      counters->Flush();
    }
    for (BatchHistogram* histogram :
         {&key_bits, &value_bits, &key_rank, &entropy, &theta, &predicted_error, &audited_error,
          &audit_ratio, &audit_bound_ratio, &error_bound, &batch_duration, &batch_sequences,
          &batch_tokens}) {
      histogram->Flush();
    }
    for (BatchHistogram& stage : stages) stage.Flush();
  }

  BatchCounters sequences, attended_tokens, appended_tokens, bytes_read, bytes_baseline, pages_read,
      pages_skipped, dense_tokens, head_decisions, head_policies, fallbacks;
  BatchHistogram key_bits, value_bits, key_rank, entropy, theta, predicted_error, audited_error,
      audit_ratio, audit_bound_ratio, error_bound, batch_duration, batch_sequences, batch_tokens;
  std::vector<BatchHistogram> stages;
  LiveTotals totals;  // of the batch at hand
};

Metrics::Metrics(const MetricsInfo& info)
    : handles_(std::make_unique<Handles>(info)),
      sums_(std::make_unique<BatchSums>(handles_->registry)) {
  const size_t cells = LatencyBucketBounds().size() + 1;
  for (std::vector<double>& counts : totals_.stage_counts) counts.resize(cells);
  totals_.batch_counts.resize(cells);
  const size_t error_cells = BucketBounds("predicted_relative_error").size() + 1;
  totals_.predicted_error_counts.resize(error_cells);
  totals_.audited_error_counts.resize(error_cells);
}
Metrics::~Metrics() = default;

void Metrics::OnRequest(RpcMethod method, int code, absl::Duration latency) {
  const auto row = static_cast<size_t>(method);
  const size_t column = code >= 0 && code < kNumStatusCodes ? static_cast<size_t>(code) : 2;
  handles_->requests[row * kNumStatusCodes + column]->Increment();
  handles_->request_duration[row]->Observe(absl::ToDoubleSeconds(latency));
  handles_->num_requests.fetch_add(1, std::memory_order_relaxed);
  if (column != 0) handles_->num_failed_requests.fetch_add(1, std::memory_order_relaxed);
}

void Metrics::OnWire(WireDirection direction, WireTransport transport, int64_t bytes) {
  const size_t cell = static_cast<size_t>(direction) * 2 + static_cast<size_t>(transport);
  handles_->wire_bytes[cell]->Increment(static_cast<double>(bytes));
}

void Metrics::OnStreams(int delta) {
  handles_->num_streams.fetch_add(delta, std::memory_order_relaxed);
  delta > 0 ? handles_->streams->Increment(delta) : handles_->streams->Decrement(-delta);
}

void Metrics::OnSpans(bool exported, int64_t count) {
  handles_->spans[exported ? 0 : 1]->Increment(static_cast<double>(count));
}

void Metrics::SetLimits(const LimitValues& limits) {
  for (size_t i = 0; i < limits.size(); ++i) {
    handles_->limits[i]->Set(static_cast<double>(limits[i]));
  }
  const MutexLock lock(&mutex_);
  totals_.limits = limits;
}

void Metrics::SetReady(bool ready) { handles_->ready->Set(ready ? 1 : 0); }

void Metrics::SetInflightBytesSource(std::function<int64_t()> source) {
  handles_->inflight_bytes_source = std::move(source);
}

void Metrics::AddHead(const StepReport& step, const HeadDecision& head, int32_t head_dim) {
  BatchSums& sums = *sums_;
  const HeadSums mean = SumHead(head, head_dim);
  for (int32_t i = 0; i < kNumKeyDepths; ++i) {
    sums.pages_read.Add(static_cast<size_t>(KeyDepthBits(i) / 2 - 1), head.key_pages[i]);
  }
  for (size_t i = 1; i < kNumValueDepths; ++i) {
    sums.pages_read.Add(4 + i - 1, head.value_pages[i]);
  }
  sums.pages_skipped.Add(0, head.value_pages[0] - head.exact_pages);
  sums.dense_tokens.Add(0, head.dense_tokens);
  sums.bytes_read.Add(0, head.key_bytes);
  sums.bytes_read.Add(1, head.value_bytes);
  sums.bytes_read.Add(2, head.basis_bytes);
  sums.key_bits.Observe(mean.key_bits);
  sums.value_bits.Observe(mean.value_bits);
  sums.key_rank.Observe(mean.rank);
  sums.entropy.Observe(head.entropy);
  if (head.theta > 0) {
    sums.theta.Observe(head.theta);
    if (step.mode != AttendMode::kDeterministic) sums.predicted_error.Observe(head.predicted_error);
  }
  if (step.mode == AttendMode::kDeterministic) sums.error_bound.Observe(head.error_bound);
  const int64_t row = static_cast<int64_t>(step.mode) * kPrecisions + PrecisionIndex(mean.key_bits);
  sums.head_decisions.Add(static_cast<size_t>(row * kRankQuarters + mean.rank_quarter), 1);
  sums.head_policies.Add(static_cast<size_t>(step.policy), 1);
  AddHeadTotals(head, mean, &sums.totals);
}

void Metrics::AddStages(const BatchReport& report) {
  const TaskTimes& times = report.times;
  const std::pair<Stage, absl::Duration> stages[] = {
      {Stage::kCopyIn, times.copy_in},  {Stage::kAppend, times.append},
      {Stage::kScan, times.scan},       {Stage::kSelect, times.select},
      {Stage::kAttend, times.attend},   {Stage::kMerge, times.merge},
      {Stage::kCopyOut, times.copy_out}};
  for (const auto& [stage, duration] : stages) {
    if (duration == absl::ZeroDuration()) continue;  // No such stage in this batch.
    sums_->stages[static_cast<size_t>(stage)].Observe(absl::ToDoubleSeconds(duration));
  }
  for (const absl::Duration wait : report.queue_times) {
    sums_->stages[static_cast<size_t>(Stage::kQueue)].Observe(absl::ToDoubleSeconds(wait));
  }
  sums_->batch_duration.Observe(absl::ToDoubleSeconds(report.total));
  sums_->batch_sequences.Observe(static_cast<double>(report.steps.size()));
  sums_->batch_tokens.Observe(static_cast<double>(report.q_tokens + report.appended_tokens));
}

void Metrics::OnBatch(const BatchReport& report) {
  LiveTotals& batch = sums_->totals;
  batch = LiveTotals();
  for (const StepReport& step : report.steps) {
    sums_->sequences.Add(static_cast<size_t>(step.code), 1);
    ++(step.code == absl::StatusCode::kOk ? batch.sequences : batch.failed_sequences);
    for (const HeadDecision& head : step.heads) {
      AddHead(step, head, report.shape.head_dim);
    }
    if (step.decision == nullptr) continue;
    sums_->bytes_baseline.Add(0, step.decision->bytes_bf16);
    sums_->bytes_baseline.Add(1, step.decision->bytes_bf16 / 2);
    batch.bf16_bytes += step.decision->bytes_bf16;
    const auto fallback = static_cast<size_t>(step.decision->fallback);
    ++batch.fallbacks[fallback];
    if (fallback > 0) sums_->fallbacks.Add(fallback - 1, 1);
  }
  sums_->attended_tokens.Add(0, report.q_tokens);
  sums_->appended_tokens.Add(0, report.appended_tokens);
  AddStages(report);
  {
    const MutexLock lock(&mutex_);
    totals_.key_bytes += batch.key_bytes;
    totals_.value_bytes += batch.value_bytes;
    totals_.basis_bytes += batch.basis_bytes;
    totals_.bf16_bytes += batch.bf16_bytes;
    totals_.sequences += batch.sequences;
    totals_.failed_sequences += batch.failed_sequences;
    totals_.batches += 1;
    totals_.q_tokens += report.q_tokens;
    totals_.appended_tokens += report.appended_tokens;
    totals_.dense_tokens += batch.dense_tokens;
    const auto add = [](auto* sums, const auto& more) {
      for (size_t i = 0; i < more.size(); ++i) (*sums)[i] += more[i];
    };
    add(&totals_.key_pages, batch.key_pages);
    add(&totals_.value_pages, batch.value_pages);
    add(&totals_.rank_quarters, batch.rank_quarters);
    add(&totals_.fallbacks, batch.fallbacks);
    for (size_t i = 0; i < kNumStages; ++i) sums_->stages[i].AddTo(&totals_.stage_counts[i]);
    sums_->batch_duration.AddTo(&totals_.batch_counts);
    sums_->predicted_error.AddTo(&totals_.predicted_error_counts);
  }
  sums_->Flush();
}

void Metrics::OnSeal(const SealReport& report) {
  handles_->pages_sealed->Increment(report.pages_sealed);
  handles_->bases_fitted->Increment(report.bases_fitted);
  BatchHistogram& stage = sums_->stages[static_cast<size_t>(Stage::kSeal)];
  stage.Observe(absl::ToDoubleSeconds(report.duration));
  {
    const MutexLock lock(&mutex_);
    stage.AddTo(&totals_.stage_counts[static_cast<size_t>(Stage::kSeal)]);
    if (report.pages_sealed > 0) totals_.drift_ratio = report.drift_ratio;
  }
  stage.Flush();
  if (report.pages_sealed > 0) {
    handles_->drift_ratio->Set(report.drift_ratio);
  }
}

void Metrics::OnAudit(const AuditReport& report) {
  handles_->audits[report.exact_reference ? 1 : 0]->Increment();
  for (size_t i = 0; i < report.actual.size(); ++i) {
    sums_->audited_error.Observe(report.actual[i]);
    if (i < report.predicted.size() && report.predicted[i] > 0) {
      sums_->audit_ratio.Observe(report.actual[i] / report.predicted[i]);
    }
  }
  for (size_t i = 0; i < report.bounds.size(); ++i) {
    sums_->audit_bound_ratio.Observe(report.actual[i] / report.bounds[i]);
    if (report.actual[i] > report.bounds[i]) handles_->bound_violations->Increment();
  }
  {
    const MutexLock lock(&mutex_);
    sums_->audited_error.AddTo(&totals_.audited_error_counts);
  }
  sums_->audited_error.Flush();
  sums_->audit_ratio.Flush();
  sums_->audit_bound_ratio.Flush();
}

void Metrics::OnGauges(const GaugeReport& report) {
  Handles& h = *handles_;
  h.sessions->Set(static_cast<double>(report.sessions));
  h.queue_depth->Set(static_cast<double>(report.load.tasks));
  h.queue_bytes->Set(static_cast<double>(report.load.bytes));
  h.seal_backlog->Set(static_cast<double>(report.seal_backlog));
  for (size_t i = 0; i < kNumPageStates; ++i) {
    h.kv_pages[i]->Set(static_cast<double>(report.pages.pages[i]));
    h.kv_bytes[i]->Set(static_cast<double>(report.pages.bytes[i]));
  }
  h.kv_bytes[kNumPageStates]->Set(static_cast<double>(report.pages.free_bytes));
  h.kv_pool_bytes->Set(static_cast<double>(report.pages.pool_bytes));
  h.kv_exact_tier_bytes->Set(static_cast<double>(report.pages.exact_tier_bytes));
  const MutexLock lock(&mutex_);
  totals_.gauges = report;
}

void Metrics::OnSessionEvent(SessionEvent event, int64_t count) {
  handles_->session_events[static_cast<size_t>(event)]->Increment(static_cast<double>(count));
}

std::string Metrics::Serialize() const {
  if (handles_->inflight_bytes_source) {
    handles_->inflight_bytes->Set(static_cast<double>(handles_->inflight_bytes_source()));
  }
  std::vector<prometheus::MetricFamily> families = handles_->registry.Collect();
  FillProcessMetrics(&families);
  std::ostringstream text;
  prometheus::TextSerializer().Serialize(text, families);
  return text.str();
}

LiveTotals Metrics::totals() const {
  const auto& inflight = handles_->inflight_bytes_source;
  const int64_t inflight_bytes = inflight ? inflight() : 0;
  const MutexLock lock(&mutex_);
  LiveTotals totals = totals_;
  totals.inflight_bytes = inflight_bytes;
  return totals;
}

int64_t Metrics::streams() const { return handles_->num_streams.load(std::memory_order_relaxed); }
int64_t Metrics::requests() const { return handles_->num_requests.load(std::memory_order_relaxed); }
int64_t Metrics::failed_requests() const {
  return handles_->num_failed_requests.load(std::memory_order_relaxed);
}

}  // namespace adaattn

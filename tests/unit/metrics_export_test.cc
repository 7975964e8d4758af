#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "server/histogram.h"
#include "server/metric_table.h"
#include "server/metrics.h"
#include "tests/support/exposition.h"

namespace adaattn {
namespace {

MetricsInfo TestInfo() { return {"1.2.3", "abc", "cc 1", "cpu", "test device", "avx2"}; }

TEST(MetricTableTest, NamesFollowTheRulesAndAreUnique) {
  std::set<std::string> names;
  for (const MetricDescriptor& metric : MetricTable()) {
    EXPECT_TRUE(names.insert(metric.name).second) << metric.name << " twice";
    const bool ours = metric.name.rfind("adaattn_", 0) == 0;
    EXPECT_TRUE(ours || metric.name.rfind("process_", 0) == 0) << metric.name;
    const bool total =
        metric.name.size() > 6 && metric.name.substr(metric.name.size() - 6) == "_total";
    EXPECT_EQ(total, metric.type == MetricType::kCounter) << metric.name;
    EXPECT_EQ(metric.buckets.empty(), metric.type != MetricType::kHistogram) << metric.name;
    EXPECT_TRUE(std::is_sorted(metric.buckets.begin(), metric.buckets.end())) << metric.name;
    EXPECT_FALSE(metric.help.empty()) << metric.name;
    EXPECT_EQ(metric.name.find(':'), std::string::npos) << "colons are for recording rules";
    for (const MetricLabel& label : metric.labels) EXPECT_NE(label.name, "session") << metric.name;
  }
}

TEST(MetricTableTest, LatencyStartsAtTenMicroseconds) {
  for (const char* name : {"adaattn_request_duration_seconds", "adaattn_stage_duration_seconds"}) {
    bool found = false;
    for (const MetricDescriptor& metric : MetricTable()) {
      if (metric.name != name) continue;
      EXPECT_DOUBLE_EQ(metric.buckets.front(), 1e-5) << name;
      found = true;
    }
    EXPECT_TRUE(found) << name;
  }
}

TEST(MetricTableTest, JsonListsEveryMetric) {
  const auto parsed = nlohmann::json::parse(MetricTableJson());
  ASSERT_EQ(parsed.size(), MetricTable().size());
  for (size_t i = 0; i < parsed.size(); ++i) EXPECT_EQ(parsed[i]["name"], MetricTable()[i].name);
}

TEST(MetricsTest, SeriesAreBoundedAndAllThereFromTheStart) {
  int64_t expected = 0;
  for (const MetricDescriptor& metric : MetricTable()) expected += metric.num_series();
  EXPECT_LE(expected, 1500);
  Metrics metrics(TestInfo());
  const auto before = ParseExposition(metrics.Serialize());
  EXPECT_EQ(static_cast<int64_t>(before.size()), expected);
  for (int code = 0; code < kNumStatusCodes; ++code) {
    metrics.OnRequest(RpcMethod::kAttend, code, absl::Milliseconds(1));
  }
  EXPECT_EQ(ParseExposition(metrics.Serialize()).size(), before.size());
}

TEST(MetricsTest, RequestsAreCountedByMethodAndCode) {
  Metrics metrics(TestInfo());
  metrics.OnRequest(RpcMethod::kAttend, 0, absl::Microseconds(20));
  metrics.OnRequest(RpcMethod::kAttend, 0, absl::Microseconds(5));
  metrics.OnRequest(RpcMethod::kOpenSession, 3, absl::Seconds(60));
  metrics.OnRequest(RpcMethod::kOpenSession, 99, absl::ZeroDuration());
  auto samples = ParseExposition(metrics.Serialize());
  EXPECT_EQ(samples["adaattn_requests_total{code=\"OK\",method=\"Attend\"}"], 2);
  EXPECT_EQ(samples["adaattn_requests_total{code=\"INVALID_ARGUMENT\",method=\"OpenSession\"}"], 1);
  EXPECT_EQ(samples["adaattn_requests_total{code=\"UNKNOWN\",method=\"OpenSession\"}"], 1);
  const std::string bucket = "adaattn_request_duration_seconds_bucket{method=\"Attend\",le=";
  EXPECT_EQ(samples[bucket + "\"1e-05\"}"], 1);
  EXPECT_EQ(samples[bucket + "\"2.5e-05\"}"], 2);
  EXPECT_EQ(metrics.requests(), 4);
  EXPECT_EQ(metrics.failed_requests(), 2);
}

// A head that read two pages at 4 bits of half the rank, one at 8 bits of all, and 70 dense tokens.
HeadDecision SampleHead() {
  HeadDecision head{};
  head.key_pages[KeyDepthIndex(4, 2)] = 2;
  head.key_pages[KeyDepthIndex(8, 4)] = 1;
  head.value_pages[0] = 2;
  head.value_pages[4] = 1;
  head.dense_tokens = 70;
  head.theta = 0.003f;
  head.entropy = 1.2f;
  head.predicted_error = 0.04f;
  head.key_bytes = (int64_t{1} << 40) + 1;  // beyond what a float could count
  head.value_bytes = 2000;
  head.basis_bytes = 300;
  return head;
}

TEST(MetricsTest, ABatchAddsWhatItsHeadsRead) {
  Metrics metrics(TestInfo());
  const std::vector<HeadDecision> heads(2, SampleHead());
  DecisionSummary decision;
  decision.bytes_bf16 = 1001;
  decision.fallback = Fallback::kBudget;
  StepReport good, bad;
  good.attended = true;
  good.decision = &decision;
  good.heads = heads;
  bad.code = absl::StatusCode::kNotFound;
  const std::vector<StepReport> steps = {good, bad};
  const std::vector<absl::Duration> waits = {absl::Microseconds(30), absl::Microseconds(40)};
  BatchReport report;
  report.shape = {4, 2, 128};
  report.num_tasks = 2;
  report.q_tokens = 2;
  report.appended_tokens = 1;
  report.steps = steps;
  report.queue_times = waits;
  report.times.scan = absl::Microseconds(100);
  report.total = absl::Microseconds(300);
  metrics.OnBatch(report);
  metrics.OnBatch(report);

  const std::string text = metrics.Serialize();
  auto samples = ParseExposition(text);
  EXPECT_EQ(samples["adaattn_kv_bytes_read_total{backend=\"cpu\",tensor=\"key\"}"],
            4.0 * ((int64_t{1} << 40) + 1));
  EXPECT_NE(text.find("tensor=\"key\"} 4398046511108\n"), std::string::npos) << "to the byte";
  EXPECT_EQ(samples["adaattn_kv_bytes_read_total{backend=\"cpu\",tensor=\"value\"}"], 8000);
  EXPECT_EQ(samples["adaattn_kv_bytes_read_total{backend=\"cpu\",tensor=\"basis\"}"], 1200);
  EXPECT_EQ(samples["adaattn_kv_bytes_baseline_total{format=\"bf16\"}"], 2002);
  EXPECT_EQ(samples["adaattn_kv_bytes_baseline_total{format=\"fp8\"}"], 1000);
  EXPECT_EQ(samples["adaattn_pages_read_total{bits=\"4\",tensor=\"key\"}"], 8);
  EXPECT_EQ(samples["adaattn_pages_read_total{bits=\"8\",tensor=\"key\"}"], 4);
  EXPECT_EQ(samples["adaattn_pages_read_total{bits=\"8\",tensor=\"value\"}"], 4);
  EXPECT_EQ(samples["adaattn_pages_read_total{bits=\"2\",tensor=\"value\"}"], 0);
  EXPECT_EQ(samples["adaattn_pages_skipped_total"], 8);
  EXPECT_EQ(samples["adaattn_dense_tokens_read_total"], 280);
  EXPECT_EQ(samples["adaattn_sequences_total{status=\"OK\"}"], 2);
  EXPECT_EQ(samples["adaattn_sequences_total{status=\"NOT_FOUND\"}"], 2);
  EXPECT_EQ(samples["adaattn_fallbacks_total{reason=\"budget\"}"], 2);
  // Mean key bits (4 + 4 + 8) / 3, mean rank (64 + 64 + 128) / 3 of 128.
  EXPECT_EQ(samples["adaattn_head_decisions_total{mode=\"statistical\",precision=\"6\","
                    "rank_bucket=\"0.75\"}"],
            4);
  EXPECT_DOUBLE_EQ(samples["adaattn_key_bits_sum"], 4 * 16.0 / 3);
  EXPECT_EQ(samples["adaattn_stage_duration_seconds_count{stage=\"queue\"}"], 4);
  EXPECT_EQ(samples["adaattn_stage_duration_seconds_count{stage=\"scan\"}"], 2);
  EXPECT_EQ(samples["adaattn_stage_duration_seconds_count{stage=\"attend\"}"], 0);
  EXPECT_EQ(samples["adaattn_batch_sequences_sum"], 4);

  const LiveTotals totals = metrics.totals();
  EXPECT_EQ(totals.key_bytes, 4 * ((int64_t{1} << 40) + 1));
  EXPECT_EQ(totals.bf16_bytes, 2002);
  EXPECT_EQ(totals.rank_quarters[2], 4);
  EXPECT_EQ(totals.failed_sequences, 2);
}

TEST(MetricsTest, DensePagesCountAsSixteenBits) {
  Metrics metrics(TestInfo());
  HeadDecision head{};
  head.dense_tokens = 10;
  DecisionSummary decision;
  StepReport step;
  step.mode = AttendMode::kExact;
  step.decision = &decision;
  step.heads = absl::MakeConstSpan(&head, 1);
  BatchReport report;
  report.shape = {1, 1, 64};
  report.steps = absl::MakeConstSpan(&step, 1);
  metrics.OnBatch(report);
  auto samples = ParseExposition(metrics.Serialize());
  EXPECT_EQ(samples["adaattn_key_bits_sum"], 16);
  EXPECT_EQ(samples["adaattn_head_decisions_total{mode=\"exact\",precision=\"16\","
                    "rank_bucket=\"1\"}"],
            1);
  EXPECT_EQ(samples["adaattn_theta_count"], 0) << "no ladder ran";
}

TEST(MetricsTest, ValuesThatAreNotFiniteLeaveNoTrace) {
  Metrics metrics(TestInfo());
  const float actual[] = {0.02f, std::numeric_limits<float>::quiet_NaN(), 0.5f};
  const float predicted[] = {0.04f, 0.01f, 0};
  AuditReport audit;
  audit.actual = actual;
  audit.predicted = predicted;
  metrics.OnAudit(audit);
  auto samples = ParseExposition(metrics.Serialize());
  EXPECT_EQ(samples["adaattn_audited_relative_error_count"], 2);
  EXPECT_EQ(samples["adaattn_audit_ratio_count{kind=\"predicted\"}"], 1);
  EXPECT_NEAR(samples["adaattn_audit_ratio_sum{kind=\"predicted\"}"], 0.5, 1e-6);
  EXPECT_EQ(samples["adaattn_audits_total{reference=\"full_depth\"}"], 1);
}

TEST(MetricsTest, GaugesSealsAndEventsAreKept) {
  Metrics metrics(TestInfo());
  GaugeReport gauges;
  gauges.sessions = 3;
  gauges.pages.pages = {5, 6, 7};
  gauges.pages.bytes = {500, 600, 700};
  gauges.pages.free_bytes = 99;
  gauges.load.tasks = 2;
  metrics.OnGauges(gauges);
  SealReport seal;
  seal.pages_sealed = 8;
  seal.bases_fitted = 1;
  seal.drift_ratio = 1.5f;
  metrics.OnSeal(seal);
  metrics.OnSessionEvent(SessionEvent::kExpired, 2);
  metrics.OnStreams(1);
  metrics.SetReady(true);
  metrics.SetLimits({10, 20, 30, 40, 50, 60});
  metrics.SetInflightBytesSource([] { return int64_t{4096}; });
  auto samples = ParseExposition(metrics.Serialize());
  EXPECT_EQ(samples["adaattn_sessions"], 3);
  EXPECT_EQ(samples["adaattn_kv_pages{state=\"sealed\"}"], 6);
  EXPECT_EQ(samples["adaattn_kv_bytes{state=\"basis\"}"], 700);
  EXPECT_EQ(samples["adaattn_kv_bytes{state=\"free\"}"], 99);
  EXPECT_EQ(samples["adaattn_queue_depth"], 2);
  EXPECT_EQ(samples["adaattn_pages_sealed_total"], 8);
  EXPECT_EQ(samples["adaattn_basis_drift_ratio"], 1.5);
  EXPECT_EQ(samples["adaattn_session_events_total{event=\"expired\"}"], 2);
  EXPECT_EQ(samples["adaattn_streams"], 1);
  EXPECT_EQ(samples["adaattn_ready"], 1);
  EXPECT_EQ(samples["adaattn_limit{resource=\"queued_tasks\"}"], 10);
  EXPECT_EQ(samples["adaattn_limit{resource=\"seal_backlog_pages\"}"], 60);
  EXPECT_EQ(samples["adaattn_inflight_bytes"], 4096);
  EXPECT_EQ(samples["adaattn_build_info{commit=\"abc\",compiler=\"cc 1\",version=\"1.2.3\"}"], 1);
  EXPECT_GT(samples["process_resident_memory_bytes"], 1 << 20);
  EXPECT_GT(samples["process_start_time_seconds"], 1.6e9);
  EXPECT_GE(samples["process_open_fds"], 3);
}

TEST(HistogramQuantileTest, InterpolatesInsideTheBucket) {
  const std::vector<double> bounds = {1, 2, 4};
  EXPECT_DOUBLE_EQ(HistogramQuantile(bounds, {0, 10, 0, 0}, 0.5), 1.5);
  EXPECT_DOUBLE_EQ(HistogramQuantile(bounds, {5, 0, 5, 0}, 0.75), 3);
  EXPECT_DOUBLE_EQ(HistogramQuantile(bounds, {0, 0, 0, 3}, 0.5), 4) << "beyond the last bound";
  EXPECT_DOUBLE_EQ(HistogramQuantile(bounds, {0, 0, 0, 0}, 0.5), 0);
}

}  // namespace
}  // namespace adaattn

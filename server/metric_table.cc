#include "server/metric_table.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "kernels/policy/names.h"

namespace adaattn {
namespace {

using Labels = std::vector<MetricLabel>;
using Values = std::vector<std::string>;
using Buckets = std::vector<double>;

template <typename Enum>
Values Names(int count, const char* (*name)(Enum)) {
  Values names;
  for (int i = 0; i < count; ++i) names.emplace_back(name(static_cast<Enum>(i)));
  return names;
}

Values CodeNames() {
  Values names;
  for (int i = 0; i < kNumStatusCodes; ++i) names.emplace_back(StatusCodeName(i));
  return names;
}

const Buckets& LatencyBuckets() {
  static const Buckets* const buckets =
      new Buckets{1e-5,   2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2,
                  2.5e-2, 5e-2,   0.1,  0.25, 0.5,    1,    2.5,  5,      10};
  return *buckets;
}

Buckets PowersOfTwo(int last) {
  Buckets buckets;
  for (int i = 0; i <= last; ++i) buckets.push_back(static_cast<double>(int64_t{1} << i));
  return buckets;
}

const Buckets kErrorBuckets = {0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05,
                               0.07,  0.1,   0.15,  0.2,  0.3,  0.5,  1};
const Buckets kRatioBuckets = {0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1, 1.2, 1.5, 2, 3, 5};
const Buckets kKeyBitsBuckets = {4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8, 16};
const Buckets kValueBitsBuckets = {0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 7, 8, 16};
const Buckets kRankBuckets = {16, 32, 48, 64, 80, 96, 112, 128, 192, 256};
const Buckets kEntropyBuckets = {0.25, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10};
const Buckets kThetaBuckets = {1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 0.02, 0.05, 0.2, 1};

void Add(std::vector<MetricDescriptor>* table, MetricType type, const char* name, const char* help,
         Labels labels = {}, Buckets buckets = {}) {
  table->push_back(
      {absl::StrCat("adaattn_", name), type, help, std::move(labels), std::move(buckets)});
}

void AddRequestMetrics(std::vector<MetricDescriptor>* table) {
  const MetricLabel method{"method", Names(kNumRpcMethods, &RpcMethodName)};
  Add(table, MetricType::kCounter, "requests_total",
      "Calls answered, by gRPC status; of AttendStream, messages.",
      {method, {"code", CodeNames()}});
  Add(table, MetricType::kCounter, "sequences_total",
      "Sequences of Attend, AttendStream and ImportKv that the engine answered.",
      {{"status", CodeNames()}});
  Add(table, MetricType::kHistogram, "request_duration_seconds",
      "From a call's (of AttendStream and ImportKv: a message's) arrival to its answer.", {method},
      LatencyBuckets());
  Add(table, MetricType::kHistogram, "stage_duration_seconds",
      "Time by stage: of a task in the queue, of a batch in the engine, of a sealing slice.",
      {{"stage", Names(kNumStages, &StageName)}}, LatencyBuckets());
  Add(table, MetricType::kHistogram, "batch_duration_seconds",
      "From taking a batch to its last reply.", {}, LatencyBuckets());
  Add(table, MetricType::kHistogram, "batch_sequences", "Sequences that ran together.", {},
      PowersOfTwo(10));
  Add(table, MetricType::kHistogram, "batch_tokens", "Query rows and appended rows of a batch.", {},
      PowersOfTwo(16));
  Add(table, MetricType::kCounter, "appended_tokens_total", "Tokens appended, over layers.");
  Add(table, MetricType::kCounter, "attended_tokens_total", "Query rows answered, over layers.");
  Add(table, MetricType::kGauge, "queue_depth", "Tasks waiting.");
  Add(table, MetricType::kGauge, "queue_bytes", "Payload bytes of the tasks waiting.");
  Add(table, MetricType::kGauge, "inflight_bytes", "Payload bytes received and not yet answered.");
  Add(table, MetricType::kGauge, "streams", "AttendStream calls open.");
  Add(table, MetricType::kCounter, "wire_bytes_total",
      "Message bytes of Attend, AttendStream and ImportKv.",
      {{"direction", {"in", "out"}}, {"transport", {"tcp", "unix"}}});
}

void AddTraceMetrics(std::vector<MetricDescriptor>* table) {
  Add(table, MetricType::kCounter, "trace_spans_total",
      "Spans sent to the collector, or dropped because it was slow or away.",
      {{"outcome", {"exported", "dropped"}}});
}

void AddDecisionMetrics(std::vector<MetricDescriptor>* table) {
  Add(table, MetricType::kCounter, "kv_bytes_read_total",
      "Bytes of K, V (with their metadata) and bases that attention loaded, counted where it "
      "loads.",
      {{"tensor", {"key", "value", "basis"}}, {"backend", {}}});
  Add(table, MetricType::kCounter, "kv_bytes_baseline_total",
      "Bytes of K and V that a cache of this format would have loaded for the same rows.",
      {{"format", {"bf16", "fp8"}}});
  Add(table, MetricType::kCounter, "pages_read_total",
      "Sealed (page, kv head) pairs by the depth at which they were read.",
      {{"tensor", {"key", "value"}}, {"bits", {"2", "4", "6", "8"}}});
  Add(table, MetricType::kCounter, "pages_skipped_total",
      "Sealed (page, kv head) pairs whose mean stood in for their values.");
  Add(table, MetricType::kCounter, "dense_tokens_read_total",
      "(token, kv head) pairs read from dense pages.");
  Add(table, MetricType::kCounter, "head_decisions_total",
      "Steps of one kv head by mode, by the stored precision nearest to its mean key bits, and by "
      "the quarter of head_dim into which its mean rank falls.",
      {{"mode", {"exact", "full_depth", "statistical", "static", "deterministic"}},
       {"precision", {"4", "6", "8", "16"}},
       {"rank_bucket", {"0.25", "0.5", "0.75", "1"}}});
  Add(table, MetricType::kCounter, "head_policies_total",
      "Steps of one kv head by the policy that chose its depths; full_depth includes exact ones.",
      {{"policy", Names<Policy>(kNumPolicies, PolicyName)}});
  Add(table, MetricType::kHistogram, "key_bits", "Mean key bits of a step of one kv head.", {},
      kKeyBitsBuckets);
  Add(table, MetricType::kHistogram, "value_bits", "Mean value bits of a step of one kv head.", {},
      kValueBitsBuckets);
  Add(table, MetricType::kHistogram, "key_rank",
      "Mean channels of K read in a step of one kv head.", {}, kRankBuckets);
  Add(table, MetricType::kHistogram, "attention_entropy_nats",
      "Entropy of the page shares in a step of one kv head.", {}, kEntropyBuckets);
  Add(table, MetricType::kHistogram, "theta", "Threshold of a ladder step of one kv head.", {},
      kThetaBuckets);
  Add(table, MetricType::kCounter, "fallbacks_total",
      "Sequences read deeper, or with a looser target, than their options say.",
      {{"reason",
        {"no_basis", "budget", "pressure", "stored_bits", "exact_pages", "bound_unmet"}}});
  Add(table, MetricType::kHistogram, "predicted_relative_error",
      "Predicted relative error of a ladder step of one kv head: a prediction, not a bound.", {},
      kErrorBuckets);
  Add(table, MetricType::kHistogram, "audited_relative_error",
      "Relative error that an audit found in a step of one kv head.", {}, kErrorBuckets);
  Add(table, MetricType::kHistogram, "audit_ratio",
      "What an audit found over what had been said before.", {{"kind", {"predicted", "bound"}}},
      kRatioBuckets);
  Add(table, MetricType::kHistogram, "relative_error_bound",
      "Bound on the relative error of a deterministic step of one kv head, where there is one.", {},
      kErrorBuckets);
  Add(table, MetricType::kCounter, "bound_violations_total",
      "Audited steps of one kv head whose error exceeded its bound: must stay 0.");
  Add(table, MetricType::kCounter, "audits_total", "Sequences recomputed after their reply.",
      {{"reference", {"full_depth", "exact"}}});
}

void AddCacheMetrics(std::vector<MetricDescriptor>* table) {
  const Values states = {"dense", "sealed", "basis", "exact"};
  Add(table, MetricType::kGauge, "sessions", "Sessions open.");
  Add(table, MetricType::kCounter, "session_events_total", "What became of sessions.",
      {{"event", {"opened", "closed", "expired", "forked", "truncated", "reopened"}}});
  Add(table, MetricType::kGauge, "kv_pages", "Pages in use; one page holds all kv heads.",
      {{"state", states}});
  Add(table, MetricType::kGauge, "kv_bytes",
      "Bytes by use: of the pool, or (exact) of the exact tier in host memory.",
      {{"state", {"dense", "sealed", "basis", "exact", "free"}}});
  Add(table, MetricType::kGauge, "kv_pool_bytes", "Bytes of the pool.");
  Add(table, MetricType::kGauge, "kv_exact_tier_bytes", "Bytes of the exact tier.");
  Add(table, MetricType::kCounter, "pages_sealed_total", "Pages sealed.");
  Add(table, MetricType::kCounter, "bases_fitted_total", "Bases fitted.");
  Add(table, MetricType::kGauge, "seal_backlog_pages",
      "Pages that are due for sealing and not sealed yet.");
  Add(table, MetricType::kGauge, "basis_drift_ratio",
      "Largest drift among the pages sealed last: 1 = the basis fits as when it was made.");
}

void AddProcessMetrics(std::vector<MetricDescriptor>* table) {
  Add(table, MetricType::kGauge, "ready", "1 while the server takes new sessions.");
  Add(table, MetricType::kGauge, "limit",
      "Configured ends of what can run out: the denominators of utilisation.",
      {{"resource", Names(kNumLimits, &LimitName)}});
  Add(table, MetricType::kGauge, "build_info", "1; what was built.",
      {{"version", {}}, {"commit", {}}, {"compiler", {}}});
  Add(table, MetricType::kGauge, "device_info", "1; what the backend runs on.",
      {{"backend", {}}, {"device", {}}, {"kernels", {}}});
  const auto add = [table](MetricType type, const char* name, const char* help) {
    table->push_back({name, type, help, {}, {}});
  };
  add(MetricType::kCounter, "process_cpu_seconds_total", "User and system time of the process.");
  add(MetricType::kGauge, "process_resident_memory_bytes", "Resident memory of the process.");
  add(MetricType::kGauge, "process_virtual_memory_bytes", "Virtual memory of the process.");
  add(MetricType::kGauge, "process_open_fds", "Open file descriptors of the process.");
  add(MetricType::kGauge, "process_threads", "Threads of the process.");
  add(MetricType::kGauge, "process_start_time_seconds", "Start of the process, Unix time.");
}

const char* TypeName(MetricType type) {
  return type == MetricType::kCounter ? "counter"
         : type == MetricType::kGauge ? "gauge"
                                      : "histogram";
}

}  // namespace

int64_t MetricDescriptor::num_series() const {
  int64_t count = type == MetricType::kHistogram ? static_cast<int64_t>(buckets.size()) + 3 : 1;
  for (const MetricLabel& label : labels) {
    if (!label.values.empty()) count *= static_cast<int64_t>(label.values.size());
  }
  return count;
}

const std::vector<MetricDescriptor>& MetricTable() {
  static const std::vector<MetricDescriptor>* const table = [] {
    auto* made = new std::vector<MetricDescriptor>;
    AddRequestMetrics(made);
    AddTraceMetrics(made);
    AddDecisionMetrics(made);
    AddCacheMetrics(made);
    AddProcessMetrics(made);
    return made;
  }();
  return *table;
}

std::string MetricTableJson() {
  nlohmann::ordered_json all = nlohmann::ordered_json::array();
  for (const MetricDescriptor& metric : MetricTable()) {
    nlohmann::ordered_json labels = nlohmann::ordered_json::object();
    for (const MetricLabel& label : metric.labels) labels[label.name] = label.values;
    nlohmann::ordered_json entry = {
        {"name", metric.name}, {"type", TypeName(metric.type)}, {"help", metric.help}};
    entry["labels"] = labels;
    if (metric.type == MetricType::kHistogram) entry["buckets"] = metric.buckets;
    all.push_back(entry);
  }
  return all.dump(2);
}

const char* RpcMethodName(RpcMethod method) {
  static constexpr const char* kNames[kNumRpcMethods] = {
      "OpenSession",   "ImportKv",   "Attend",       "AttendStream", "TruncateSession",
      "ForkSession",   "ExportKv",   "CloseSession", "KeepAlive",    "ListSessions",
      "UploadProfile", "GetProfile", "GetServerInfo"};
  return kNames[static_cast<int>(method)];
}

const char* StageName(Stage stage) {
  static constexpr const char* kNames[kNumStages] = {
      "queue", "copy_in", "append", "scan", "select", "attend", "merge", "copy_out", "seal"};
  return kNames[static_cast<int>(stage)];
}

const char* LimitName(Limit limit) {
  static constexpr const char* kNames[kNumLimits] = {"queued_tasks",   "queued_bytes",
                                                     "inflight_bytes", "sessions",
                                                     "pool_bytes",     "seal_backlog_pages"};
  return kNames[static_cast<int>(limit)];
}

const char* StatusCodeName(int code) {
  static constexpr const char* kNames[kNumStatusCodes] = {"OK",
                                                          "CANCELLED",
                                                          "UNKNOWN",
                                                          "INVALID_ARGUMENT",
                                                          "DEADLINE_EXCEEDED",
                                                          "NOT_FOUND",
                                                          "ALREADY_EXISTS",
                                                          "PERMISSION_DENIED",
                                                          "RESOURCE_EXHAUSTED",
                                                          "FAILED_PRECONDITION",
                                                          "ABORTED",
                                                          "OUT_OF_RANGE",
                                                          "UNIMPLEMENTED",
                                                          "INTERNAL",
                                                          "UNAVAILABLE",
                                                          "DATA_LOSS",
                                                          "UNAUTHENTICATED"};
  return code >= 0 && code < kNumStatusCodes ? kNames[code] : "UNKNOWN";
}

}  // namespace adaattn

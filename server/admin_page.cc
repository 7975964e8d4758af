#include "server/admin_page.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/time/clock.h"
#include "server/histogram.h"
#include "server/live_page/live_page.h"

namespace adaattn {
namespace {

using Json = nlohmann::ordered_json;

int64_t BytesRead(const LiveTotals& totals) {
  return totals.key_bytes + totals.value_bytes + totals.basis_bytes;
}

// Null where nothing was attended: no saving is not the same as a saving of zero.
Json SavedFraction(const LiveTotals& now, const LiveTotals& before) {
  const int64_t baseline = now.bf16_bytes - before.bf16_bytes;
  if (baseline <= 0) return nullptr;
  const auto read = static_cast<double>(BytesRead(now) - BytesRead(before));
  return 1 - read / static_cast<double>(baseline);
}

std::vector<double> Difference(const std::vector<double>& now, const std::vector<double>& before) {
  std::vector<double> counts(now);
  for (size_t i = 0; i < std::min(now.size(), before.size()); ++i) counts[i] -= before[i];
  return counts;
}

double Quantile(const std::vector<double>& counts, double share) {
  return HistogramQuantile(LatencyBucketBounds(), counts, share);
}

double Sum(const std::vector<double>& counts) {
  double sum = 0;
  for (const double count : counts) sum += count;
  return sum;
}

// Null where nothing was observed.
Json ErrorQuantile(const char* metric, const std::vector<double>& counts, double share) {
  if (Sum(counts) <= 0) return nullptr;
  return HistogramQuantile(BucketBounds(metric), counts, share);
}

Json PredictedError(const LiveTotals& now, const LiveTotals& before, double share) {
  return ErrorQuantile("predicted_relative_error",
                       Difference(now.predicted_error_counts, before.predicted_error_counts),
                       share);
}

Json AuditedError(const LiveTotals& now, const LiveTotals& before, double share) {
  return ErrorQuantile("audited_relative_error",
                       Difference(now.audited_error_counts, before.audited_error_counts), share);
}

// How full what has a hard end is, in the order of Limit.
std::array<double, kNumHardLimits> Utilisation(const LiveTotals& totals) {
  const GaugeReport& gauges = totals.gauges;
  const std::array<int64_t, kNumHardLimits> used = {
      gauges.load.tasks, gauges.load.bytes, totals.inflight_bytes, gauges.sessions,
      gauges.pages.pool_bytes - gauges.pages.free_bytes};
  std::array<double, kNumHardLimits> ratios{};
  for (size_t i = 0; i < ratios.size(); ++i) {
    if (totals.limits[i] <= 0) continue;
    ratios[i] = static_cast<double>(used[i]) / static_cast<double>(totals.limits[i]);
  }
  return ratios;
}

Json TotalsJson(const LiveTotals& totals, const Metrics& metrics) {
  Json json;
  json["requests"] = metrics.requests();
  json["failed_requests"] = metrics.failed_requests();
  json["sequences"] = totals.sequences;
  json["failed_sequences"] = totals.failed_sequences;
  json["batches"] = totals.batches;
  json["q_tokens"] = totals.q_tokens;
  json["appended_tokens"] = totals.appended_tokens;
  json["bytes_read"] = {
      {"key", totals.key_bytes}, {"value", totals.value_bytes}, {"basis", totals.basis_bytes}};
  json["bytes_bf16"] = totals.bf16_bytes;
  json["saved_fraction"] = SavedFraction(totals, LiveTotals());
  for (size_t i = 0; i < totals.key_pages.size(); ++i) {
    json["key_pages"][std::to_string(4 + 2 * i)] = totals.key_pages[i];
  }
  for (size_t i = 0; i < totals.value_pages.size(); ++i) {
    json["value_pages"][std::to_string(2 * i)] = totals.value_pages[i];
  }
  json["dense_tokens"] = totals.dense_tokens;
  json["rank_quarters"] = totals.rank_quarters;
  for (size_t i = 0; i < totals.fallbacks.size(); ++i) {
    json["fallbacks"][FallbackName(static_cast<Fallback>(i))] = totals.fallbacks[i];
  }
  return json;
}

Json NowJson(const LiveTotals& now, const LiveTotals& before, double seconds) {
  const auto rate = [seconds](int64_t count) {
    return seconds > 0 ? static_cast<double>(count) / seconds : 0.0;
  };
  Json json;
  json["window_seconds"] = seconds;
  json["saved_fraction"] = SavedFraction(now, before);
  json["bytes_read_per_second"] = rate(BytesRead(now) - BytesRead(before));
  json["bytes_bf16_per_second"] = rate(now.bf16_bytes - before.bf16_bytes);
  json["sequences_per_second"] = rate(now.sequences - before.sequences);
  json["q_tokens_per_second"] = rate(now.q_tokens - before.q_tokens);
  json["predicted_error_p50"] = PredictedError(now, before, 0.5);
  json["predicted_error_p99"] = PredictedError(now, before, 0.99);
  json["audited_error_p50"] = AuditedError(now, before, 0.5);
  json["audited_error_p99"] = AuditedError(now, before, 0.99);
  const std::vector<double> batches = Difference(now.batch_counts, before.batch_counts);
  const bool ran = Sum(batches) > 0;
  json["batch_p50"] = ran ? Json(Quantile(batches, 0.5)) : nullptr;
  json["batch_p99"] = ran ? Json(Quantile(batches, 0.99)) : nullptr;
  json["stages"] = Json::array();
  const auto add = [&json](const char* name, const std::vector<double>& counts) {
    json["stages"].push_back({{"stage", name},
                              {"p50", Quantile(counts, 0.5)},
                              {"p99", Quantile(counts, 0.99)},
                              {"count", Sum(counts)}});
  };
  for (size_t i = 0; i < kNumStages; ++i) {
    add(StageName(static_cast<Stage>(i)), Difference(now.stage_counts[i], before.stage_counts[i]));
  }
  add("whole batch", Difference(now.batch_counts, before.batch_counts));
  return json;
}

Json CacheJson(const LiveTotals& totals, const Metrics& metrics) {
  const GaugeReport& gauges = totals.gauges;
  Json json;
  json["sessions"] = gauges.sessions;
  json["streams"] = metrics.streams();
  json["queue_depth"] = gauges.load.tasks;
  json["queue_bytes"] = gauges.load.bytes;
  json["seal_backlog"] = gauges.seal_backlog;
  json["drift_ratio"] = totals.drift_ratio;
  for (size_t i = 0; i < kNumPageStates; ++i) {
    const char* const state = PageStateName(static_cast<PageState>(i));
    json["pages"][state] = gauges.pages.pages[i];
    json["bytes"][state] = gauges.pages.bytes[i];
  }
  json["bytes"]["free"] = gauges.pages.free_bytes;
  json["pool_bytes"] = gauges.pages.pool_bytes;
  json["exact_tier_bytes"] = gauges.pages.exact_tier_bytes;
  const std::array<double, kNumHardLimits> ratios = Utilisation(totals);
  const auto fullest = std::max_element(ratios.begin(), ratios.end());
  json["fullest"] = *fullest;
  json["fullest_resource"] = LimitName(static_cast<Limit>(fullest - ratios.begin()));
  for (size_t i = 0; i < ratios.size(); ++i) {
    json["utilisation"][LimitName(static_cast<Limit>(i))] = ratios[i];
  }
  return json;
}

// One value per interval between two points; `end_seconds` is when it ended, since the start.
Json HistoryJson(const std::deque<LiveHistory::Point>& points, absl::Time start) {
  Json json;
  json["capacity"] = LiveHistory::kCapacity;
  for (const char* name : {"end_seconds", "saved_fraction", "batch_p50", "batch_p99",
                           "predicted_error_p50", "predicted_error_p99", "audited_error_p50",
                           "q_tokens_per_second", "utilisation", "sessions"}) {
    json[name] = Json::array();
  }
  for (size_t i = 1; i < points.size(); ++i) {
    const LiveTotals &at = points[i].totals, &before = points[i - 1].totals;
    const double seconds = absl::ToDoubleSeconds(points[i].time - points[i - 1].time);
    const std::vector<double> counts = Difference(at.batch_counts, before.batch_counts);
    const bool ran = Sum(counts) > 0;
    const std::array<double, kNumHardLimits> full = Utilisation(at);
    json["end_seconds"].push_back(absl::ToDoubleSeconds(points[i].time - start));
    json["saved_fraction"].push_back(SavedFraction(at, before));
    json["batch_p50"].push_back(ran ? Json(Quantile(counts, 0.5)) : nullptr);
    json["batch_p99"].push_back(ran ? Json(Quantile(counts, 0.99)) : nullptr);
    json["predicted_error_p50"].push_back(PredictedError(at, before, 0.5));
    json["predicted_error_p99"].push_back(PredictedError(at, before, 0.99));
    json["audited_error_p50"].push_back(AuditedError(at, before, 0.5));
    json["q_tokens_per_second"].push_back(
        seconds > 0 ? static_cast<double>(at.q_tokens - before.q_tokens) / seconds : 0.0);
    json["utilisation"].push_back(*std::max_element(full.begin(), full.end()));
    json["sessions"].push_back(at.gauges.sessions);
  }
  return json;
}

HttpReply EmbeddedFile(const char* type, const unsigned char* bytes, size_t size) {
  return {200, type, std::string(reinterpret_cast<const char*>(bytes), size)};
}

}  // namespace

void LiveHistory::Sample(absl::Time now) {
  Point point = {now, metrics_->totals()};
  const MutexLock lock(&mutex_);
  if (num_samples_++ % stride_ == 0) since_start_.push_back(point);
  if (since_start_.size() > kCapacity + 1) {
    std::deque<Point> kept;
    for (size_t i = 0; i < since_start_.size(); i += 2) kept.push_back(std::move(since_start_[i]));
    since_start_ = std::move(kept);
    stride_ *= 2;
  }
  recent_.push_back(std::move(point));
  while (recent_.size() > kCapacity + 1) recent_.pop_front();
}

std::string LiveHistory::Json(absl::Time now, bool ready) const {
  const LiveTotals totals = metrics_->totals();
  nlohmann::ordered_json json;
  json["server"] = {{"version", info_.version},
                    {"commit", info_.commit},
                    {"backend", info_.backend},
                    {"device", info_.device},
                    {"kernels", info_.kernels},
                    {"ready", ready},
                    {"uptime_seconds", absl::ToDoubleSeconds(now - start_)}};
  json["totals"] = TotalsJson(totals, *metrics_);
  const MutexLock lock(&mutex_);
  if (recent_.empty()) {
    json["now"] = NowJson(totals, LiveTotals(), absl::ToDoubleSeconds(now - start_));
  } else {
    const Point& before = recent_[recent_.size() > kWindow ? recent_.size() - kWindow : 0];
    json["now"] = NowJson(totals, before.totals, absl::ToDoubleSeconds(now - before.time));
  }
  json["cache"] = CacheJson(totals, *metrics_);
  json["history"] = HistoryJson(recent_, start_);
  std::deque<Point> whole = since_start_;
  if (!whole.empty() && whole.back().time < recent_.back().time) whole.push_back(recent_.back());
  json["since_start"] = HistoryJson(whole, start_);
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

std::map<std::string, HttpServer::Handler> AdminHandlers(const Metrics* metrics,
                                                         const LiveHistory* history,
                                                         const Exemplars* exemplars,
                                                         const std::function<bool()>& ready) {
  return {
      {"/metrics",
       [metrics] {
         return HttpReply{200, "text/plain; version=0.0.4; charset=utf-8", metrics->Serialize()};
       }},
      {"/openmetrics",
       [metrics, exemplars] {
         return HttpReply{200, "application/openmetrics-text; version=1.0.0; charset=utf-8",
                          exemplars->OpenMetrics(metrics->Serialize())};
       }},
      {"/healthz",
       [] {
         return HttpReply{200, "text/plain; charset=utf-8", "ok\n"};
       }},
      {"/readyz",
       [ready] {
         return ready() ? HttpReply{200, "text/plain; charset=utf-8", "ready\n"}
                        : HttpReply{503, "text/plain; charset=utf-8", "not ready\n"};
       }},
      {"/api/live",
       [history, ready] {
         return HttpReply{200, "application/json", history->Json(absl::Now(), ready())};
       }},
      {"/", [] { return EmbeddedFile("text/html; charset=utf-8", kLiveHtml, kLiveHtmlSize); }},
      {"/icon.svg", [] { return EmbeddedFile("image/svg+xml", kIconSvg, kIconSvgSize); }},
      {"/live.css", [] { return EmbeddedFile("text/css; charset=utf-8", kLiveCss, kLiveCssSize); }},
      {"/panels.js",
       [] { return EmbeddedFile("text/javascript; charset=utf-8", kPanelsJs, kPanelsJsSize); }},
      {"/live.js",
       [] { return EmbeddedFile("text/javascript; charset=utf-8", kLiveJs, kLiveJsSize); }}};
}

}  // namespace adaattn

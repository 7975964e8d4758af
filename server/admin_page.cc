#include "server/admin_page.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/time/clock.h"
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
  const char* const reasons[] = {"none", "no_basis", "budget", "pressure"};
  for (size_t i = 0; i < totals.fallbacks.size(); ++i) {
    json["fallbacks"][reasons[i]] = totals.fallbacks[i];
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
  const char* const states[] = {"dense", "sealed", "basis"};
  for (size_t i = 0; i < kNumPageStates; ++i) {
    json["pages"][states[i]] = gauges.pages.pages[i];
    json["bytes"][states[i]] = gauges.pages.bytes[i];
  }
  json["bytes"]["free"] = gauges.pages.free_bytes;
  json["pool_bytes"] = gauges.pages.pool_bytes;
  return json;
}

HttpReply EmbeddedFile(const char* type, const unsigned char* bytes, size_t size) {
  return {200, type, std::string(reinterpret_cast<const char*>(bytes), size)};
}

}  // namespace

void LiveHistory::Sample(absl::Time now) {
  LiveTotals totals = metrics_->totals();
  const MutexLock lock(&mutex_);
  points_.push_back({now, std::move(totals)});
  while (points_.size() > kCapacity + 1) points_.pop_front();
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
  if (points_.empty()) {
    json["now"] = NowJson(totals, LiveTotals(), absl::ToDoubleSeconds(now - start_));
  } else {
    const Point& before = points_[points_.size() > kWindow ? points_.size() - kWindow : 0];
    json["now"] = NowJson(totals, before.totals, absl::ToDoubleSeconds(now - before.time));
  }
  json["cache"] = CacheJson(totals, *metrics_);
  nlohmann::ordered_json& history = json["history"];
  history["interval_seconds"] = absl::ToDoubleSeconds(kInterval);
  history["capacity"] = kCapacity;
  for (const char* name : {"saved_fraction", "batch_p50", "batch_p99", "sessions"}) {
    history[name] = nlohmann::ordered_json::array();
  }
  for (size_t i = 1; i < points_.size(); ++i) {
    const LiveTotals& at = points_[i].totals;
    const std::vector<double> counts =
        Difference(at.batch_counts, points_[i - 1].totals.batch_counts);
    const bool ran = Sum(counts) > 0;
    history["saved_fraction"].push_back(SavedFraction(at, points_[i - 1].totals));
    history["batch_p50"].push_back(ran ? nlohmann::ordered_json(Quantile(counts, 0.5)) : nullptr);
    history["batch_p99"].push_back(ran ? nlohmann::ordered_json(Quantile(counts, 0.99)) : nullptr);
    history["sessions"].push_back(at.gauges.sessions);
  }
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

std::map<std::string, HttpServer::Handler> AdminHandlers(const Metrics* metrics,
                                                         const LiveHistory* history,
                                                         const std::function<bool()>& ready) {
  return {
      {"/metrics",
       [metrics] {
         return HttpReply{200, "text/plain; version=0.0.4; charset=utf-8", metrics->Serialize()};
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
      {"/live.css", [] { return EmbeddedFile("text/css; charset=utf-8", kLiveCss, kLiveCssSize); }},
      {"/live.js",
       [] { return EmbeddedFile("text/javascript; charset=utf-8", kLiveJs, kLiveJsSize); }}};
}

}  // namespace adaattn

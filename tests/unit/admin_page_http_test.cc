#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "server/admin_page.h"
#include "tests/support/exposition.h"
#include "tests/support/http_get.h"

namespace adaattn {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class AdminPageTest : public ::testing::Test {
 protected:
  AdminPageTest()
      : metrics_({"1.0", "abc", "cc", "cpu", "device", "avx2"}),
        history_(&metrics_, {"1.0", "abc", "cc", "cpu", "device", "avx2"}, start_) {
    auto server = HttpServer::Start("127.0.0.1:0", AdminHandlers(&metrics_, &history_, &exemplars_,
                                                                 [this] { return ready_.load(); }));
    EXPECT_TRUE(server.ok()) << server.status();
    server_ = std::move(*server);
  }

  // A batch of one kv head that read `bytes` where BF16 would have read 1000.
  void RunBatch(int64_t bytes) {
    HeadDecision head{};
    head.key_pages[KeyDepthIndex(4, 2)] = 3;
    head.value_pages[0] = 3;
    head.key_bytes = bytes;
    DecisionSummary decision;
    decision.bytes_bf16 = 1000;
    StepReport step;
    step.decision = &decision;
    step.heads = absl::MakeConstSpan(&head, 1);
    BatchReport report;
    report.shape = {1, 1, 64};
    report.q_tokens = 1;
    report.steps = absl::MakeConstSpan(&step, 1);
    report.total = absl::Microseconds(80);
    metrics_.OnBatch(report);
  }

  nlohmann::json Live(absl::Time now) { return nlohmann::json::parse(history_.Json(now, ready_)); }

  const absl::Time start_ = absl::FromUnixSeconds(1700000000);
  Metrics metrics_;
  LiveHistory history_;
  Exemplars exemplars_;
  std::atomic<bool> ready_{true};
  std::unique_ptr<HttpServer> server_;
};

TEST_F(AdminPageTest, ServesMetricsHealthAndReadiness) {
  const HttpResponse metrics = HttpGet(server_->port(), "/metrics");
  EXPECT_EQ(metrics.status, 200);
  EXPECT_THAT(metrics.content_type, HasSubstr("version=0.0.4"));
  EXPECT_EQ(ParseExposition(metrics.body).count("adaattn_sessions"), 1u);
  EXPECT_EQ(HttpGet(server_->port(), "/healthz").status, 200);
  EXPECT_EQ(HttpGet(server_->port(), "/readyz").status, 200);
  ready_ = false;
  EXPECT_EQ(HttpGet(server_->port(), "/readyz").status, 503);
  EXPECT_EQ(HttpGet(server_->port(), "/healthz").status, 200) << "alive while draining";
}

TEST_F(AdminPageTest, OpenMetricsShowsTheTracesBehindBuckets) {
  metrics_.OnRequest(RpcMethod::kAttend, 0, absl::Microseconds(300));
  exemplars_.Add(RpcMethod::kAttend, absl::Microseconds(300), "4bf92f35",
                 absl::FromUnixMillis(1700000000500));
  const HttpResponse reply = HttpGet(server_->port(), "/openmetrics");
  EXPECT_THAT(reply.content_type, HasSubstr("application/openmetrics-text; version=1.0.0"));
  EXPECT_THAT(reply.body,
              HasSubstr("adaattn_request_duration_seconds_bucket{method=\"Attend\",le=\"0.0005\"} "
                        "1 # {trace_id=\"4bf92f35\"} 0.0003 1700000000.500\n"));
  EXPECT_THAT(reply.body, HasSubstr("# TYPE adaattn_requests counter\n"));
  EXPECT_THAT(reply.body, HasSubstr("\nadaattn_requests_total{"));
  EXPECT_EQ(reply.body.substr(reply.body.size() - 6), "# EOF\n");
  EXPECT_EQ(reply.body.find("trace_id"), reply.body.rfind("trace_id")) << "no other bucket";
}

TEST_F(AdminPageTest, ThePageNeedsNothingFromElsewhere) {
  std::string all;
  for (const char* path : {"/", "/live.css", "/panels.js", "/live.js"}) {
    const HttpResponse file = HttpGet(server_->port(), path);
    EXPECT_EQ(file.status, 200) << path;
    EXPECT_GT(file.body.size(), 500u) << path;
    all += file.body;
  }
  for (const char* outside : {"https://", "//cdn", "@import"}) {
    EXPECT_THAT(all, Not(HasSubstr(outside)));
  }
  // The only absolute address is the name of the SVG namespace.
  EXPECT_EQ(all.find("http://"), all.find("http://www.w3.org/2000/svg"));
  EXPECT_EQ(all.find("http://"), all.rfind("http://"));
  EXPECT_THAT(all, HasSubstr("prefers-color-scheme: dark"));
}

TEST_F(AdminPageTest, AnswersOnlyKnownPathsAndReads) {
  EXPECT_EQ(HttpGet(server_->port(), "/nothing").status, 404);
  EXPECT_EQ(HttpGet(server_->port(), "/metrics/../../etc/passwd").status, 404);
  EXPECT_EQ(HttpRequest(server_->port(), "POST", "/metrics").status, 405);
  EXPECT_EQ(HttpRequest(server_->port(), "DELETE", "/").status, 405);
  EXPECT_EQ(HttpRequest(server_->port(), "HEAD", "/healthz").status, 200);
}

TEST_F(AdminPageTest, ManyReadersAtOnceAllGetTheirAnswer) {
  std::atomic<int> good{0};
  std::vector<std::thread> readers;
  readers.reserve(8);
  for (int i = 0; i < 8; ++i) {
    readers.emplace_back([this, &good] {
      for (int round = 0; round < 5; ++round) {
        good += HttpGet(server_->port(), "/metrics").status == 200;
      }
    });
  }
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(good, 40);
}

TEST_F(AdminPageTest, LiveJsonTellsNowFromTheStart) {
  RunBatch(900);
  history_.Sample(start_);
  for (int second = 1; second <= 20; ++second) {
    RunBatch(200);
    history_.Sample(start_ + absl::Seconds(second));
  }
  const auto live = Live(start_ + absl::Seconds(20));
  EXPECT_NEAR(live["now"]["saved_fraction"], 0.8, 1e-9);
  EXPECT_NEAR(live["totals"]["saved_fraction"], 1 - (900 + 20 * 200) / 21000.0, 1e-9);
  EXPECT_NEAR(live["now"]["q_tokens_per_second"], 1, 1e-9);
  EXPECT_EQ(live["totals"]["key_pages"]["4"], 63);
  EXPECT_EQ(live["totals"]["value_pages"]["0"], 63);
  EXPECT_EQ(live["totals"]["rank_quarters"][1], 21);
  EXPECT_EQ(live["history"]["saved_fraction"].size(), 20u);
  EXPECT_EQ(live["server"]["uptime_seconds"], 20);
  EXPECT_EQ(live["server"]["ready"], true);
}

TEST_F(AdminPageTest, NothingAttendedIsNoSavingRatherThanZero) {
  const auto fresh = Live(start_);
  EXPECT_TRUE(fresh["totals"]["saved_fraction"].is_null());
  EXPECT_TRUE(fresh["now"]["saved_fraction"].is_null());
  history_.Sample(start_);
  history_.Sample(start_ + absl::Seconds(1));
  EXPECT_TRUE(Live(start_ + absl::Seconds(1))["history"]["batch_p50"][0].is_null());
}

TEST_F(AdminPageTest, HistoryForgetsWhatIsOlderThanItsCapacity) {
  for (int second = 0; second < LiveHistory::kCapacity + 50; ++second) {
    history_.Sample(start_ + absl::Seconds(second));
  }
  const auto live = Live(start_ + absl::Seconds(LiveHistory::kCapacity + 50));
  EXPECT_EQ(live["history"]["sessions"].size(), static_cast<size_t>(LiveHistory::kCapacity));
}

TEST_F(AdminPageTest, TheTimeSinceTheStartIsKeptInEverLongerIntervals) {
  const int seconds = 10 * LiveHistory::kCapacity + 7;
  for (int second = 0; second <= seconds; ++second) {
    RunBatch(second < seconds / 2 ? 900 : 100);
    history_.Sample(start_ + absl::Seconds(second));
  }
  const auto all = Live(start_ + absl::Seconds(seconds))["since_start"];
  const size_t count = all["end_seconds"].size();
  EXPECT_GT(count, size_t{LiveHistory::kCapacity} / 3);
  EXPECT_LE(count, size_t{LiveHistory::kCapacity} + 1);
  EXPECT_LE(all["end_seconds"][0], 16) << "begins at the start";
  EXPECT_EQ(all["end_seconds"][count - 1], seconds) << "ends now";
  EXPECT_NEAR(all["saved_fraction"][0], 0.1, 1e-9);
  EXPECT_NEAR(all["saved_fraction"][count - 1], 0.9, 1e-9);
  EXPECT_NEAR(all["q_tokens_per_second"][count / 2], 1, 1e-9);
}

TEST_F(AdminPageTest, TellsHowFullWhatHasAnEndIs) {
  metrics_.SetLimits({10, 1000, 100, 8, 5000, 4});
  metrics_.SetInflightBytesSource([] { return int64_t{25}; });
  GaugeReport gauges;
  gauges.load.tasks = 2;
  gauges.sessions = 6;
  gauges.pages.pool_bytes = 5000;
  gauges.pages.free_bytes = 4000;
  metrics_.OnGauges(gauges);
  history_.Sample(start_);
  history_.Sample(start_ + absl::Seconds(1));
  const auto live = Live(start_ + absl::Seconds(1));
  const auto& full = live["cache"]["utilisation"];
  EXPECT_EQ(full["queued_tasks"], 0.2);
  EXPECT_EQ(full["inflight_bytes"], 0.25);
  EXPECT_EQ(full["sessions"], 0.75);
  EXPECT_EQ(full["pool_bytes"], 0.2);
  EXPECT_EQ(live["cache"]["fullest"], 0.75);
  EXPECT_EQ(live["history"]["utilisation"][0], 0.75);
}

TEST_F(AdminPageTest, ErrorsAreNullUntilThereIsOneAndThenQuantiles) {
  history_.Sample(start_);
  EXPECT_TRUE(Live(start_)["now"]["audited_error_p50"].is_null());
  const float actual[] = {0.015f, 0.025f}, predicted[] = {0.02f, 0.02f};
  AuditReport audit;
  audit.actual = actual;
  audit.predicted = predicted;
  metrics_.OnAudit(audit);
  const auto now = Live(start_ + absl::Seconds(1))["now"];
  EXPECT_NEAR(now["audited_error_p50"], 0.02, 1e-9);
  EXPECT_TRUE(now["predicted_error_p50"].is_null()) << "an audit predicts nothing";
}

TEST(HttpServerTest, SaysWhyItCannotListen) {
  auto first = HttpServer::Start("127.0.0.1:0", {});
  ASSERT_TRUE(first.ok()) << first.status();
  const std::string taken = "127.0.0.1:" + std::to_string((*first)->port());
  const auto second = HttpServer::Start(taken, {});
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(taken));
  EXPECT_FALSE(HttpServer::Start("nonsense:port", {}).ok());
}

}  // namespace
}  // namespace adaattn

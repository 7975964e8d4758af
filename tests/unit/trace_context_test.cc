#include <gtest/gtest.h>

#include <atomic>
#include <string>

#include "server/http_server.h"
#include "server/trace.h"

namespace adaattn {
namespace {

constexpr char kGood[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

TEST(TraceparentTest, TellsIdsAndWhetherASpanIsWanted) {
  const TraceContext context = ParseTraceparent(kGood);
  EXPECT_EQ(context.trace_id, "4bf92f3577b34da6a3ce929d0e0e4736");
  EXPECT_EQ(context.parent_id, "00f067aa0ba902b7");
  EXPECT_TRUE(context.sampled);
  const std::string start = std::string(kGood).substr(0, 53);
  EXPECT_FALSE(ParseTraceparent(start + "00").sampled);
  EXPECT_TRUE(ParseTraceparent(start + "03").sampled) << "other flags do not matter";
  EXPECT_TRUE(ParseTraceparent("01" + std::string(kGood).substr(2) + "-more").sampled)
      << "later versions may say more";
}

TEST(TraceparentTest, WhatIsNotWellFormedIsIgnored) {
  for (const char* header :
       {"", "00", "00-1-2-01", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-zz"}) {
    EXPECT_FALSE(ParseTraceparent(header).sampled) << header;
  }
}

TEST(TraceEndpointTest, IsAPlainHttpAddressWithAPath) {
  const auto endpoint = ParseTraceEndpoint("http://collector:4318/v1/traces");
  ASSERT_TRUE(endpoint.ok()) << endpoint.status();
  EXPECT_EQ(endpoint->host, "collector");
  EXPECT_EQ(endpoint->port, 4318);
  EXPECT_EQ(endpoint->path, "/v1/traces");
  for (const char* url : {"https://collector:4318/v1/traces", "http://collector/v1/traces",
                          "http://collector:0/v1", "http://collector:70000/v1", "http://:1/v1",
                          "http://collector:4318", "collector:4318/v1"}) {
    EXPECT_EQ(ParseTraceEndpoint(url).status().code(), absl::StatusCode::kInvalidArgument) << url;
  }
}

TEST(TraceExporterTest, CountsAsDroppedWhatTheCollectorDoesNotTake) {
  // It answers 405 to every POST.
  auto collector = HttpServer::Start("127.0.0.1:0", {});
  ASSERT_TRUE(collector.ok()) << collector.status();
  std::atomic<int64_t> exported{0}, dropped{0};
  {
    TraceExporter exporter({"127.0.0.1", (*collector)->port(), "/v1/traces"}, "i",
                           [&](bool ok, int64_t count) { (ok ? exported : dropped) += count; });
    Span span;
    span.children.resize(2);
    exporter.Record(ParseTraceparent(kGood), span);
    exporter.Record(TraceContext(), span);  // not sampled
  }
  EXPECT_EQ(dropped, 3);
  EXPECT_EQ(exported, 0);
}

TEST(TraceExporterTest, NeverKeepsMoreThanItsQueueHolds) {
  std::atomic<int64_t> lost{0};
  const auto recorded = static_cast<int64_t>(3 * TraceExporter::kMaxQueuedSpans);
  {
    TraceExporter exporter({"127.0.0.1", 1, "/"}, "i",
                           [&](bool ok, int64_t count) { lost += ok ? 0 : count; });
    for (int64_t i = 0; i < recorded; ++i) exporter.Record(ParseTraceparent(kGood), Span());
  }
  EXPECT_EQ(lost, recorded) << "every span is counted once";
}

}  // namespace
}  // namespace adaattn

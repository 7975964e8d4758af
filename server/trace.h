#ifndef ADAATTN_SERVER_TRACE_H_
#define ADAATTN_SERVER_TRACE_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "kernels/mutex.h"

namespace adaattn {

// What a W3C traceparent says; ids in lower-case hex, as on the wire. Not sampled: no span is
// wanted.
struct TraceContext {
  std::string trace_id;   // 32 digits
  std::string parent_id;  // 16 digits
  bool sampled = false;
};

// W3C Trace Context, section 3.2: "00-<trace id>-<parent id>-<flags>". What is not well-formed is
// ignored, as the standard asks: an unsampled context.
TraceContext ParseTraceparent(absl::string_view header);

struct Span {
  using Value = std::variant<std::string, int64_t, double>;

  std::string name;
  absl::Time start, end;
  std::vector<std::pair<const char*, Value>> attributes;
  absl::Status status;
  std::vector<Span> children;  // one level; theirs are ignored
};

// Where spans go: "http://host:port/path".
struct TraceEndpoint {
  std::string host;
  int port = 0;
  std::string path;
};
// kInvalidArgument for anything else; there is no TLS here.
absl::StatusOr<TraceEndpoint> ParseTraceEndpoint(absl::string_view url);

// Sends spans to an OpenTelemetry collector as OTLP/HTTP JSON, a few times a second, from a thread
// of its own. Whoever records never waits: where the collector is slow or away, spans are dropped
// and counted. The destructor sends what is left, once. Threads: any.
class TraceExporter {
 public:
  static constexpr size_t kMaxQueuedSpans = 4096;
  static constexpr absl::Duration kInterval = absl::Milliseconds(250);

  // `instance` tells this process from others of the service. `count` is told how many spans were
  // exported or dropped, from the exporter's thread or the recorder's; it outlives the exporter.
  TraceExporter(TraceEndpoint endpoint, std::string instance,
                std::function<void(bool exported, int64_t spans)> count);
  ~TraceExporter();
  TraceExporter(const TraceExporter&) = delete;
  TraceExporter& operator=(const TraceExporter&) = delete;

  // Queues `span` and its children; nothing unless `context` is sampled.
  void Record(const TraceContext& context, Span span);

 private:
  struct Entry {
    TraceContext context;
    Span span;
  };

  void Run();
  std::string NewSpanId();
  std::string Encode(const std::deque<Entry>& entries);
  bool Post(const std::string& body) const;

  const TraceEndpoint endpoint_;
  const std::string instance_;
  const std::function<void(bool, int64_t)> count_;
  std::mt19937_64 random_;  // exporter's thread
  Mutex mutex_;
  std::deque<Entry> queue_ ABSL_GUARDED_BY(mutex_);
  size_t queued_spans_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  CondVar wake_;
  std::thread thread_;
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_TRACE_H_

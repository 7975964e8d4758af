#include "server/trace.h"

#include <civetweb.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace adaattn {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kReplyTimeoutMs = 2000;
// OpenTelemetry's numbers.
constexpr int kKindInternal = 1, kKindServer = 2;
constexpr int kStatusOk = 1, kStatusError = 2;

bool IsLowerHex(absl::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return absl::ascii_isxdigit(c) && !absl::ascii_isupper(c); });
}

bool IsId(absl::string_view text, size_t digits) {
  return text.size() == digits && IsLowerHex(text) &&
         text.find_first_not_of('0') != absl::string_view::npos;
}

Json AttributeJson(const char* key, const Span::Value& value) {
  Json typed;
  if (const auto* text = std::get_if<std::string>(&value)) typed["stringValue"] = *text;
  // OTLP/JSON writes 64-bit integers as strings.
  if (const auto* integer = std::get_if<int64_t>(&value)) {
    typed["intValue"] = std::to_string(*integer);
  }
  if (const auto* number = std::get_if<double>(&value)) typed["doubleValue"] = *number;
  return {{"key", key}, {"value", typed}};
}

Json SpanJson(const Span& span, const std::string& trace_id, const std::string& id,
              const std::string& parent_id, int kind) {
  Json json = {{"traceId", trace_id},
               {"spanId", id},
               {"parentSpanId", parent_id},
               {"name", span.name},
               {"kind", kind},
               {"startTimeUnixNano", std::to_string(absl::ToUnixNanos(span.start))},
               {"endTimeUnixNano", std::to_string(absl::ToUnixNanos(span.end))}};
  json["attributes"] = Json::array();
  for (const auto& [key, value] : span.attributes) {
    json["attributes"].push_back(AttributeJson(key, value));
  }
  json["status"]["code"] = span.status.ok() ? kStatusOk : kStatusError;
  if (!span.status.ok()) json["status"]["message"] = std::string(span.status.message());
  return json;
}

}  // namespace

TraceContext ParseTraceparent(absl::string_view header) {
  const std::vector<absl::string_view> parts = absl::StrSplit(header, '-');
  // Later versions may append parts; version ff is none.
  if (parts.size() < 4 || parts[0].size() != 2 || !IsLowerHex(parts[0]) || parts[0] == "ff") {
    return {};
  }
  if (parts[0] == "00" && parts.size() != 4) return {};
  if (!IsId(parts[1], 32) || !IsId(parts[2], 16)) return {};
  if (parts[3].size() != 2 || !IsLowerHex(parts[3])) return {};
  int flags = 0;
  if (!absl::SimpleHexAtoi(parts[3], &flags)) return {};
  return {std::string(parts[1]), std::string(parts[2]), (flags & 1) != 0};
}

absl::StatusOr<TraceEndpoint> ParseTraceEndpoint(absl::string_view url) {
  const absl::string_view whole = url;
  if (absl::ConsumePrefix(&url, "http://")) {
    const size_t slash = url.find('/');
    const absl::string_view address = url.substr(0, slash);
    const size_t colon = address.rfind(':');
    TraceEndpoint endpoint;
    if (slash != absl::string_view::npos && colon != absl::string_view::npos && colon > 0 &&
        absl::SimpleAtoi(address.substr(colon + 1), &endpoint.port) && endpoint.port > 0 &&
        endpoint.port <= 65535) {
      endpoint.host = std::string(address.substr(0, colon));
      endpoint.path = std::string(url.substr(slash));
      return endpoint;
    }
  }
  return absl::InvalidArgumentError(absl::StrCat("\"", whole, "\" is not http://host:port/path"));
}

TraceExporter::TraceExporter(TraceEndpoint endpoint, std::string instance,
                             std::function<void(bool, int64_t)> count)
    : endpoint_(std::move(endpoint)),
      instance_(std::move(instance)),
      count_(std::move(count)),
      random_(std::random_device()()) {
  mg_init_library(0);
  thread_ = std::thread([this] { Run(); });
}

TraceExporter::~TraceExporter() {
  {
    const MutexLock lock(&mutex_);
    stop_ = true;
  }
  wake_.Signal();
  thread_.join();
  mg_exit_library();
}

void TraceExporter::Record(const TraceContext& context, Span span) {
  if (!context.sampled) return;
  const size_t spans = 1 + span.children.size();
  {
    const MutexLock lock(&mutex_);
    if (queued_spans_ + spans <= kMaxQueuedSpans) {
      queued_spans_ += spans;
      queue_.push_back({context, std::move(span)});
      return;
    }
  }
  count_(false, static_cast<int64_t>(spans));
}

void TraceExporter::Run() {
  bool stop = false;
  while (!stop) {
    std::deque<Entry> entries;
    size_t spans = 0;
    {
      const MutexLock lock(&mutex_);
      if (!stop_) wake_.WaitFor(&mutex_, kInterval);
      stop = stop_;
      entries.swap(queue_);
      spans = std::exchange(queued_spans_, 0);
    }
    if (!entries.empty()) count_(Post(Encode(entries)), static_cast<int64_t>(spans));
  }
}

std::string TraceExporter::NewSpanId() {
  uint64_t id = 0;
  while (id == 0) id = random_();
  return absl::StrCat(absl::Hex(id, absl::kZeroPad16));
}

std::string TraceExporter::Encode(const std::deque<Entry>& entries) {
  Json spans = Json::array();
  for (const Entry& entry : entries) {
    const std::string& trace_id = entry.context.trace_id;
    const std::string id = NewSpanId();
    spans.push_back(SpanJson(entry.span, trace_id, id, entry.context.parent_id, kKindServer));
    for (const Span& child : entry.span.children) {
      spans.push_back(SpanJson(child, trace_id, NewSpanId(), id, kKindInternal));
    }
  }
  const Json resource = {{"attributes",
                          {AttributeJson("service.name", std::string("adaattn-server")),
                           AttributeJson("service.instance.id", instance_)}}};
  const Json scope = {{"scope", {{"name", "adaattn"}}}, {"spans", spans}};
  const Json all = {
      {"resourceSpans", {{{"resource", resource}, {"scopeSpans", Json::array({scope})}}}}};
  return all.dump(-1, ' ', false, Json::error_handler_t::replace);
}

bool TraceExporter::Post(const std::string& body) const {
  char error[256] = "";
  mg_connection* connection = mg_connect_client(endpoint_.host.c_str(), endpoint_.port,
                                                /*use_ssl=*/0, error, sizeof(error));
  if (connection == nullptr) return false;
  mg_printf(connection,
            "POST %s HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\n"
            "Content-Length: %zu\r\nConnection: close\r\n\r\n",
            endpoint_.path.c_str(), endpoint_.host.c_str(), endpoint_.port, body.size());
  bool taken = mg_write(connection, body.data(), body.size()) == static_cast<int>(body.size());
  taken = taken && mg_get_response(connection, error, sizeof(error), kReplyTimeoutMs) >= 0;
  taken = taken && mg_get_response_info(connection)->status_code / 100 == 2;
  mg_close_connection(connection);
  return taken;
}

}  // namespace adaattn

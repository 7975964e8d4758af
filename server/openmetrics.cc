#include "server/openmetrics.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "server/histogram.h"

namespace adaattn {
namespace {

constexpr absl::string_view kBuckets = "adaattn_request_duration_seconds_bucket";

// "# TYPE adaattn_requests_total counter": OpenMetrics names a counter's family without _total.
void AppendComment(absl::string_view line, std::string* out) {
  const std::vector<absl::string_view> words = absl::StrSplit(line, absl::MaxSplits(' ', 3));
  if (words.size() < 4) return;
  absl::StrAppend(out, "# ", words[1], " ", absl::StripSuffix(words[2], "_total"), " ", words[3],
                  "\n");
}

}  // namespace

Exemplars::Exemplars() {
  for (std::vector<Exemplar>& cells : cells_) cells.resize(LatencyBucketBounds().size() + 1);
}

void Exemplars::Add(RpcMethod method, absl::Duration latency, absl::string_view trace_id,
                    absl::Time now) {
  const std::vector<double>& bounds = LatencyBucketBounds();
  const double seconds = absl::ToDoubleSeconds(latency);
  const auto bucket = std::lower_bound(bounds.begin(), bounds.end(), seconds) - bounds.begin();
  const MutexLock lock(&mutex_);
  cells_[static_cast<size_t>(method)][static_cast<size_t>(bucket)] = {
      std::string(trace_id), seconds, absl::ToDoubleSeconds(now - absl::UnixEpoch())};
}

std::string Exemplars::OpenMetrics(absl::string_view text) const {
  const size_t num_buckets = LatencyBucketBounds().size() + 1;
  std::string out;
  out.reserve(text.size() + 4096);
  const MutexLock lock(&mutex_);
  // Buckets come in the order of the table, a method's one after the other.
  size_t bucket = 0;
  for (const absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    if (line[0] == '#') {
      AppendComment(line, &out);
      continue;
    }
    absl::StrAppend(&out, line);
    if (absl::StartsWith(line, kBuckets)) {
      for (int method = 0; method < kNumRpcMethods; ++method) {
        const std::string label =
            absl::StrCat("{method=\"", RpcMethodName(static_cast<RpcMethod>(method)), "\",");
        if (!absl::StartsWith(line.substr(kBuckets.size()), label)) continue;
        const Exemplar& cell = cells_[static_cast<size_t>(method)][bucket % num_buckets];
        if (!cell.trace_id.empty()) {
          absl::StrAppendFormat(&out, " # {trace_id=\"%s\"} %.9g %.3f", cell.trace_id, cell.seconds,
                                cell.time);
        }
      }
      ++bucket;
    }
    out += '\n';
  }
  out += "# EOF\n";
  return out;
}

}  // namespace adaattn

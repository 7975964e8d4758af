#include "loadtest/bench_trace.h"

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/format/float_types.h"
#include "loadtest/row_judge.h"

namespace adaattn {
namespace {

constexpr absl::string_view kJoined = "joined:", kRandom = "random:";

// Vectors of `d` channels of two heads, `count` of each, side by side.
void AppendJoined(const uint16_t* a, const uint16_t* b, int64_t count, int64_t d,
                  std::vector<uint16_t>* to) {
  for (int64_t i = 0; i < count; ++i) {
    to->insert(to->end(), a + i * d, a + (i + 1) * d);
    to->insert(to->end(), b + i * d, b + (i + 1) * d);
  }
}

void AppendHead(const std::vector<uint16_t>& from, int64_t head, int64_t elements,
                std::vector<uint16_t>* to) {
  to->insert(to->end(), from.begin() + head * elements, from.begin() + (head + 1) * elements);
}

// What of a trace does not depend on its heads.
Trace WithoutHeads(const Trace& trace) {
  Trace made;
  made.model = trace.model;
  made.layer = trace.layer;
  made.softmax_scale = trace.softmax_scale;
  made.num_tokens = trace.num_tokens;
  made.num_rows = trace.num_rows;
  made.positions = trace.positions;
  return made;
}

// Normal q, k and v: attention without structure.
Trace RandomTrace(int32_t head_dim) {
  Trace trace;
  trace.model = "random";
  trace.shape = {8, 2, head_dim};
  trace.num_tokens = 8192;
  trace.num_rows = 64;
  trace.softmax_scale = 1 / std::sqrt(static_cast<double>(head_dim));
  for (int32_t i = 0; i < trace.num_rows; ++i) trace.positions.push_back(8192 - 64 + i);
  std::mt19937_64 engine(1);
  std::normal_distribution<float> normal;
  const auto fill = [&](std::vector<uint16_t>* values, int64_t count) {
    values->resize(count);
    for (uint16_t& value : *values) value = ToFp16(normal(engine)).bits;
  };
  fill(&trace.q, int64_t{8} * trace.num_rows * head_dim);
  fill(&trace.k, 2 * trace.num_tokens * head_dim);
  fill(&trace.v, 2 * trace.num_tokens * head_dim);
  return trace;
}

absl::StatusOr<Trace> LoadJoined(const std::string& path) {
  absl::StatusOr<Trace> trace = LoadTrace(path);
  if (!trace.ok()) return trace;
  absl::StatusOr<Trace> joined = JoinHeads(*trace);
  if (joined.ok()) return joined;
  return absl::Status(joined.status().code(), absl::StrCat(path, ": ", joined.status().message()));
}

}  // namespace

absl::StatusOr<Trace> JoinHeads(const Trace& trace) {
  const AttentionShape& shape = trace.shape;
  const int32_t pairs = shape.num_kv_heads / 2, group = shape.group_size();
  if (pairs == 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "joining heads takes at least two kv heads; the trace has ", shape.num_kv_heads));
  }
  const int64_t d = shape.head_dim, rows = trace.num_rows, tokens = trace.num_tokens;
  Trace joined = WithoutHeads(trace);
  joined.shape = {pairs * group, pairs, 2 * shape.head_dim};
  joined.softmax_scale /= std::sqrt(2.0);  // Sums over twice the channels.
  for (int64_t a = 0; a < 2 * pairs; a += 2) {
    for (int64_t q_head = a * group; q_head < (a + 1) * group; ++q_head) {
      const uint16_t* q = trace.q.data() + q_head * rows * d;
      AppendJoined(q, q + group * rows * d, rows, d, &joined.q);
    }
    const uint16_t* k = trace.k.data() + a * tokens * d;
    const uint16_t* v = trace.v.data() + a * tokens * d;
    AppendJoined(k, k + tokens * d, tokens, d, &joined.k);
    AppendJoined(v, v + tokens * d, tokens, d, &joined.v);
  }
  return joined;
}

Trace RepeatHeads(const Trace& trace, const AttentionShape& shape) {
  const int64_t d = shape.head_dim;
  Trace made = WithoutHeads(trace);
  made.shape = shape;
  const auto kv_len = static_cast<int32_t>(trace.num_tokens);
  for (int32_t head = 0; head < shape.num_q_heads; ++head) {
    const int32_t source = SourceRow(trace, shape, kv_len, 0, head).q_head;
    AppendHead(trace.q, source, trace.num_rows * d, &made.q);
  }
  for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
    AppendHead(trace.k, SourceKvHead(trace, head), trace.num_tokens * d, &made.k);
    AppendHead(trace.v, SourceKvHead(trace, head), trace.num_tokens * d, &made.v);
  }
  return made;
}

absl::StatusOr<Trace> LoadBenchTrace(const std::string& path) {
  absl::string_view rest = path;
  if (absl::ConsumePrefix(&rest, kJoined)) return LoadJoined(std::string(rest));
  if (!absl::ConsumePrefix(&rest, kRandom)) return LoadTrace(path);
  int32_t head_dim = 0;
  if (!absl::SimpleAtoi(rest, &head_dim) || head_dim < 16 || head_dim > 256) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": must be random:16 to random:256"));
  }
  return RandomTrace(head_dim);
}

std::string BenchTraceName(const std::string& path) {
  absl::string_view file = path;
  const absl::string_view kind = absl::ConsumePrefix(&file, kJoined) ? kJoined : "";
  return absl::StrCat(kind, file.substr(file.rfind('/') + 1));
}

}  // namespace adaattn

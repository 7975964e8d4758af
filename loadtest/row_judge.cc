#include "loadtest/row_judge.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <thread>
#include <utility>

#include "absl/types/span.h"
#include "kernels/format/float_types.h"
#include "kernels/reference/attention_f64.h"
#include "kernels/reference/dense_quantizers.h"

namespace adaattn {
namespace {

// work(0) .. work(count - 1) on every core.
template <class Work>
void ForEach(size_t count, const Work& work) {
  std::atomic<size_t> next{0};
  const auto drain = [&] {
    for (size_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < std::thread::hardware_concurrency(); ++i) threads.emplace_back(drain);
  drain();
  for (std::thread& thread : threads) thread.join();
}

std::vector<float> Widen(const std::vector<uint16_t>& values) {
  constexpr size_t kRun = size_t{1} << 16;
  std::vector<float> wide(values.size());
  ForEach((values.size() + kRun - 1) / kRun, [&](size_t run) {
    const size_t end = std::min(values.size(), (run + 1) * kRun);
    for (size_t i = run * kRun; i < end; ++i) wide[i] = ToFloat(Fp16{values[i]});
  });
  return wide;
}

std::vector<float> ToFp8(std::vector<float> values, int64_t head_elements) {
  ForEach(values.size() / head_elements, [&](size_t head) {
    RoundTripFp8(absl::MakeSpan(values).subspan(head * head_elements, head_elements), 1.0f);
  });
  return values;
}

}  // namespace

int32_t SourceKvHead(const Trace& trace, int32_t kv_head) {
  return kv_head % trace.shape.num_kv_heads;
}

TraceRow SourceRow(const Trace& trace, const AttentionShape& shape, int32_t kv_len,
                   int32_t sequence, int32_t q_head) {
  TraceRow source;
  source.num_tokens = std::min<int64_t>(kv_len, trace.num_tokens);
  const int32_t kv_head = q_head / shape.group_size();
  const int32_t group = trace.shape.group_size();
  const int32_t turn = kv_head / trace.shape.num_kv_heads * shape.group_size() +
                       q_head % shape.group_size() + sequence;
  source.q_head = SourceKvHead(trace, kv_head) * group + turn % group;
  std::vector<int32_t> rows(trace.num_rows);
  std::iota(rows.begin(), rows.end(), 0);
  const auto distance = [&](int32_t row) {
    return std::abs(trace.positions[row] + 1 - source.num_tokens);
  };
  std::stable_sort(rows.begin(), rows.end(),
                   [&](int32_t a, int32_t b) { return distance(a) < distance(b); });
  source.row = rows[sequence % trace.num_rows];
  return source;
}

double RelativeError(const float* out, const std::vector<double>& expected) {
  double off = 0, norm = 0;
  for (size_t c = 0; c < expected.size(); ++c) {
    off += (out[c] - expected[c]) * (out[c] - expected[c]);
    norm += expected[c] * expected[c];
  }
  return std::sqrt(off / norm);
}

RowJudge::RowJudge(const Trace* trace) : trace_(trace) {
  const int64_t head_elements = trace->num_tokens * trace->shape.head_dim;
  keys_ = Widen(trace->k);
  values_ = Widen(trace->v);
  fp8_keys_ = ToFp8(keys_, head_elements);
  fp8_values_ = ToFp8(values_, head_elements);
}

RowJudge::Answer RowJudge::Compute(const TraceRow& row) const {
  const int64_t d = trace_->shape.head_dim;
  AttentionF64Params params;
  params.shape = {1, 1, trace_->shape.head_dim};
  params.q_len = 1;
  params.q_start = row.num_tokens - 1;
  params.kv_len = row.num_tokens;
  params.softmax_scale = trace_->softmax_scale;
  std::vector<float> q(d), fp8_out(d);
  for (int64_t c = 0; c < d; ++c) {
    q[c] = ToFloat(Fp16{trace_->q[(int64_t{row.q_head} * trace_->num_rows + row.row) * d + c]});
  }
  const int64_t head = row.q_head / trace_->shape.group_size() * trace_->num_tokens * d;
  Answer answer;
  answer.out = AttentionF64(params, q.data(), keys_.data() + head, values_.data() + head).out;
  const std::vector<double> fp8 =
      AttentionF64(params, q.data(), fp8_keys_.data() + head, fp8_values_.data() + head).out;
  std::transform(fp8.begin(), fp8.end(), fp8_out.begin(),
                 [](double value) { return static_cast<float>(value); });
  answer.fp8_error = RelativeError(fp8_out.data(), answer.out);
  return answer;
}

std::vector<const RowJudge::Answer*> RowJudge::Judge(const std::vector<TraceRow>& rows) {
  std::vector<std::pair<const TraceRow, Answer>*> missing;
  std::vector<const Answer*> found;
  for (const TraceRow& row : rows) {
    const auto [at, added] = answers_.try_emplace(row);
    if (added) missing.push_back(&*at);
    found.push_back(&at->second);
  }
  ForEach(missing.size(), [&](size_t i) { missing[i]->second = Compute(missing[i]->first); });
  return found;
}

}  // namespace adaattn

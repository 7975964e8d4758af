#include "kernels/reference/attention_f64.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace adaattn {
namespace {

double Dot(const float* a, const float* b, int32_t n) {
  double sum = 0.0;
  for (int32_t i = 0; i < n; ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

// One row of one q head over `visible`; kv_offset leads to its kv head in k and v.
void AttendRow(const AttentionF64Params& params, VisibleRange visible, const float* q,
               const float* k, const float* v, int64_t kv_offset, double* out, double* lse) {
  const int32_t d = params.shape.head_dim;
  const int64_t stride = int64_t{params.shape.num_kv_heads} * d;
  *lse = -std::numeric_limits<double>::infinity();
  if (visible.begin >= visible.end) return;  // k and v may be null
  k += kv_offset;
  v += kv_offset;
  std::vector<double> scores;
  scores.reserve(static_cast<size_t>(visible.end - visible.begin));
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t t = visible.begin; t < visible.end; ++t) {
    double score = params.softmax_scale * Dot(q, k + t * stride, d);
    if (params.softcap > 0) score = params.softcap * std::tanh(score / params.softcap);
    largest = std::max(largest, score);
    scores.push_back(score);
  }
  double total = 0.0;
  for (int64_t t = visible.begin; t < visible.end; ++t) {
    const double weight = std::exp(scores[static_cast<size_t>(t - visible.begin)] - largest);
    total += weight;
    for (int32_t c = 0; c < d; ++c) out[c] += weight * v[t * stride + c];
  }
  for (int32_t c = 0; c < d; ++c) out[c] /= total;
  *lse = largest + std::log(total);
}

}  // namespace

VisibleRange VisibleTokens(int64_t position, int64_t kv_len, int64_t window) {
  VisibleRange range;
  range.end = std::min(kv_len, position + 1);
  range.begin = window > 0 ? std::max(int64_t{0}, position - window + 1) : 0;
  return range;
}

AttentionF64Result AttentionF64(const AttentionF64Params& params, const float* q, const float* k,
                                const float* v) {
  const int32_t d = params.shape.head_dim, heads = params.shape.num_q_heads;
  const int64_t rows = int64_t{params.q_len} * heads;
  AttentionF64Result result;
  result.out.assign(static_cast<size_t>(rows * d), 0.0);
  result.lse.assign(static_cast<size_t>(rows), 0.0);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t kv_offset = row % heads / params.shape.group_size() * d;
    AttendRow(params, VisibleTokens(params.q_start + row / heads, params.kv_len, params.window),
              q + row * d, k, v, kv_offset, result.out.data() + row * d,
              &result.lse[static_cast<size_t>(row)]);
  }
  return result;
}

}  // namespace adaattn

#include "kernels/cpu/merge.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/convert.h"

namespace adaattn {
namespace {

constexpr int32_t kMaxHeadDim = 256;
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// The row's log sum of exponentials over all splits.
float RowLse(const HeadJob& job, int32_t row) {
  float max = kNegativeInfinity;
  for (int32_t i = 0; i < job.num_splits; ++i) max = std::max(max, job.splits[i].rows.max[row]);
  if (max == kNegativeInfinity) return max;
  float sum = 0;
  for (int32_t i = 0; i < job.num_splits; ++i) {
    const PartialRows& split = job.splits[i].rows;
    sum += split.sum[row] * std::exp(split.max[row] - max);
  }
  return max + std::log(sum);
}

}  // namespace

float MergeHead(const AttendBatch& batch, const HeadJob& job) {
  const AttentionShape& shape = batch.shape;
  const int32_t group = shape.group_size(), head_dim = shape.head_dim;
  const int64_t out_bytes = int64_t{head_dim} * DTypeBytes(batch.out_type);
  alignas(64) float out[kMaxHeadDim];
  float entropy = 0;
  for (int32_t row = 0; row < job.rows; ++row) {
    const int64_t q_row = (job.first_q_row + row / group) * shape.num_q_heads +
                          int64_t{job.kv_head} * group + row % group;
    const float lse = RowLse(job, row);
    std::fill(out, out + head_dim, 0.0f);
    for (int32_t i = 0; i < job.num_splits && lse > kNegativeInfinity; ++i) {
      const PartialRows& split = job.splits[i].rows;
      const float weight = std::exp(split.max[row] - lse);
      if (weight == 0) continue;
      AddScaled(split.acc + int64_t{row} * head_dim, weight * job.splits[i].factor, head_dim, out);
      // sum_t p (lse - s), p = exp(s - lse).
      if (split.moment != nullptr) {
        entropy += weight * (split.sum[row] * lse - split.moment[row]);
      }
    }
    FromFloats(batch.out_type, out, 1.0f, head_dim, batch.buffers->out() + q_row * out_bytes);
    batch.buffers->lse()[q_row] = lse;
  }
  return entropy / static_cast<float>(std::max(job.rows, 1));
}

void MergeRow(const PartialRows& part, int32_t row, int32_t head_dim, PartialRows* sum) {
  if (part.max[row] == kNegativeInfinity) return;
  const float max = std::max(part.max[row], sum->max[row]);
  const float old_weight = std::exp(sum->max[row] - max), weight = std::exp(part.max[row] - max);
  float* acc = sum->acc + int64_t{row} * head_dim;
  for (int32_t c = 0; c < head_dim; ++c) acc[c] *= old_weight;
  AddScaled(part.acc + int64_t{row} * head_dim, weight, head_dim, acc);
  sum->sum[row] = sum->sum[row] * old_weight + weight * part.sum[row];
  sum->max[row] = max;
}

}  // namespace adaattn

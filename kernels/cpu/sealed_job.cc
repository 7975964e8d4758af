#include "kernels/cpu/sealed_job.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/format/nested_code.h"

namespace adaattn {
namespace {

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

}  // namespace

PageRange VisibleSealedPages(const HeadJob& head) {
  const SequenceStep& sequence = *head.sequence;
  int64_t begin = std::numeric_limits<int64_t>::max(), end = 0;
  for (int32_t i = 0; i < sequence.q_len; ++i) {
    if (head.ranges[i].begin >= head.ranges[i].end) continue;
    begin = std::min(begin, head.ranges[i].begin);
    end = std::max(end, head.ranges[i].end);
  }
  const int64_t sealed = int64_t{sequence.num_sealed_pages} * kPageTokens;
  end = std::min(end, sealed);
  if (begin >= end) return PageRange{};
  return PageRange{static_cast<int32_t>(begin / kPageTokens),
                   static_cast<int32_t>((end - 1) / kPageTokens) + 1};
}

void LocalRanges(const HeadJob& head, int32_t group_size, int32_t page, KeyRange* out) {
  const int64_t first = int64_t{page} * kPageTokens;
  for (int32_t row = 0; row < head.rows; ++row) {
    const KeyRange& range = head.ranges[row / group_size];
    out[row].begin = std::clamp<int64_t>(range.begin - first, 0, kPageTokens);
    out[row].end = std::clamp<int64_t>(range.end - first, out[row].begin, kPageTokens);
  }
}

RotatedRows JobRows(const SealedJob& job, int32_t head_dim, int32_t page) {
  const HeadJob& head = *job.head;
  int32_t index = job.first_page + page;
  size_t run = 0;
  while (index >= head.sequence->bases[run].num_pages) {
    index -= head.sequence->bases[run++].num_pages;
  }
  RotatedRows rows;
  rows.q = head.rotated + static_cast<int64_t>(run) * head.rows * head_dim;
  rows.mean = head.mean_scores + static_cast<int64_t>(run) * head.rows;
  rows.rows = head.rows;
  rows.head_dim = head_dim;
  return rows;
}

void FinishScans(SealedJob* job, int32_t first, int32_t end) {
  const float scale2 = job->head->sequence->softmax_scale * job->head->sequence->softmax_scale;
  const int32_t bits = job->ladder ? kScanBits : job->fixed.key.bits;
  for (int32_t row = 0; row < job->head->rows; ++row) {
    FinishRow(job->scans.From(int64_t{row} * job->stride + first), WholeVectors(end - first),
              scale2 * CodeVariance(1.0f, bits), scale2 * UnreadVariance(1.0f), job->ladder);
  }
}

void SumMeans(SealedJob* job, int32_t head_dim, int32_t split, int32_t first, int32_t end) {
  const PartialRows& state = job->splits[split];
  const int32_t rows = job->head->rows, count = WholeVectors(end - first);
  for (int32_t row = 0; row < rows; ++row) {
    const int64_t at = int64_t{row} * job->stride + first;
    const float max = Largest(job->scans.log_mass + at, count);
    // Masses relative to the split's own: FinishMasses makes them anew.
    const bool any = max > kNegativeInfinity;
    state.max[row] = max;
    state.sum[row] = any ? ExpBelow(job->scans.log_mass + at, max, count, job->masses + at) : 0.0f;
    if (!any) std::fill_n(job->masses + at, count, 0.0f);
  }
  std::fill_n(state.acc, int64_t{rows} * head_dim, 0.0f);
  AddValueMeans(job->means + first, end - first, head_dim, job->masses + first, job->stride, rows,
                state.acc);
}

void FinishMasses(SealedJob* job) {
  const HeadJob& head = *job->head;
  for (int32_t row = 0; row < head.rows; ++row) {
    const int64_t at = int64_t{row} * job->stride;
    float* masses = job->masses + at;
    float max = Largest(job->scans.log_mass + at, job->stride);
    for (int32_t i = 0; i < head.num_splits; ++i) max = std::max(max, head.splits[i].rows.max[row]);
    job->row_max[row] = max;
    job->row_lse[row] = max;
    if (max == kNegativeInfinity) {
      std::fill_n(masses, job->stride, 0.0f);
      continue;
    }
    float sum = ExpBelow(job->scans.log_mass + at, max, job->stride, masses);
    for (int32_t i = 0; i < head.num_splits; ++i) {
      const PartialRows& split = head.splits[i].rows;
      sum += split.sum[row] * std::exp(split.max[row] - max);
    }
    job->row_lse[row] = max + std::log(sum);
  }
}

void OpenPages(SealedJob* job, Arena* arena) {
  const SequenceStep& sequence = *job->head->sequence;
  const DecisionParams& params = sequence.decision;
  arena->Reset();
  float* margins = arena->Get<float>(job->stride);
  std::fill_n(margins, job->stride, kNegativeInfinity);
  for (int32_t row = 0; row < job->head->rows; ++row) {
    const int64_t at = int64_t{row} * job->stride;
    if (job->row_lse[row] == kNegativeInfinity) continue;
    RaiseMargins(job->scans.lse + at, job->scans.variance + at, params.coarse_z, job->row_lse[row],
                 job->stride, margins);
  }
  const float log_theta =
      std::log(GivenTheta(sequence, job->head->kv_head));  // as ladder.h's OpensPage
  for (int32_t page = 0; page < job->num_pages; ++page) {
    PageFacts& facts = job->facts[page];
    facts.opened = facts.sink || facts.cut || margins[page] > log_theta;
  }
}

}  // namespace adaattn

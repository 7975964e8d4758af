#include "loadtest/head_steps.h"

#include <cmath>
#include <utility>

#include "absl/status/status.h"
#include "kernels/feedback_state.h"

namespace adaattn {
namespace {

// Results of `rows` at the lengths they were captured at.
absl::StatusOr<std::vector<TraceRowResult>> AttendRows(TraceCache* cache,
                                                       const std::vector<int32_t>& rows,
                                                       const DecisionParams& decision) {
  std::vector<SequenceStep> steps;
  steps.reserve(rows.size());
  for (const int32_t row : rows) steps.push_back(cache->Step(row, decision));
  return cache->Attend(steps, rows);
}

// Likewise one row after the other, as steps of a layer come.
absl::StatusOr<std::vector<TraceRowResult>> FollowRows(TraceCache* cache,
                                                       const std::vector<int32_t>& rows,
                                                       const DecisionParams& decision) {
  std::vector<float> thetas(cache->trace().shape.num_kv_heads);
  FeedbackState state;
  std::vector<TraceRowResult> results;
  for (const int32_t row : rows) {
    SequenceStep step = cache->Step(row, decision);
    UseFeedback(state, thetas.data(), &step);
    auto result = cache->Attend({step}, {row});
    if (!result.ok()) return result.status();
    FollowFeedback(result->front().decisions, decision.target_relative_error, &state);
    results.push_back(std::move(result->front()));
  }
  return results;
}

}  // namespace

absl::StatusOr<HeadStepTrace> HeadStepTrace::Make(const Trace* trace,
                                                  const BackendFactory& factory) {
  HeadStepTrace made(trace, factory(TraceCache::PoolBytes(*trace, PageFormat::kProgressive, 8)));
  const auto exact = factory(TraceCache::PoolBytes(*trace, PageFormat::kBf16, 8));
  const absl::Status status = made.Load(exact.get());
  if (!status.ok()) return status;
  return made;
}

absl::Status HeadStepTrace::Load(Backend* exact) {
  if (backend_ == nullptr || exact == nullptr) return absl::InternalError("no backend");
  for (int32_t row = 0; row < trace_->num_rows; ++row) {
    if (trace_->positions[row] + 1 >= 3 * kPageTokens) rows_.push_back(row);
  }
  auto dense = TraceCache::Make(exact, trace_, PageFormat::kBf16, 8);
  if (!dense.ok()) return dense.status();
  auto results = AttendRows(dense->get(), rows_, DecisionParams());
  if (!results.ok()) return results.status();
  exact_ = *std::move(results);
  auto cache = TraceCache::Make(backend_.get(), trace_, PageFormat::kProgressive, 8);
  if (!cache.ok()) return cache.status();
  cache_ = *std::move(cache);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<HeadStep>> HeadStepTrace::Run(const DecisionParams& decision) {
  const auto results = decision.policy == Policy::kFeedback
                           ? FollowRows(cache_.get(), rows_, decision)
                           : AttendRows(cache_.get(), rows_, decision);
  if (!results.ok()) return results.status();
  const AttentionShape& shape = trace_->shape;
  const int64_t d = shape.head_dim;
  std::vector<HeadStep> steps;
  for (size_t i = 0; i < rows_.size(); ++i) {
    for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
      HeadStep step;
      step.row = rows_[i];
      step.kv_head = head;
      step.decision = (*results)[i].decisions[head];
      double all_gaps = 0, all_norms = 0;
      for (int64_t q = int64_t{head} * shape.group_size(); q < (head + 1) * shape.group_size();
           ++q) {
        double gaps = 0, norms = 0;
        for (int64_t c = q * d; c < (q + 1) * d; ++c) {
          const double truth = exact_[i].out[c];
          gaps += ((*results)[i].out[c] - truth) * ((*results)[i].out[c] - truth);
          norms += truth * truth;
        }
        step.q_errors.push_back(norms > 0 ? std::sqrt(gaps / norms) : 0);
        all_gaps += gaps;
        all_norms += norms;
      }
      step.error = all_norms > 0 ? std::sqrt(all_gaps / all_norms) : 0;
      steps.push_back(std::move(step));
    }
  }
  return steps;
}

HeadStepSummary HeadStepTrace::Summarise(const std::vector<HeadStep>& steps, double target) const {
  HeadStepSummary summary;
  double bytes = 0, bf16 = 0;
  for (const HeadStep& step : steps) {
    summary.mean_error += step.error;
    summary.above += step.error > target ? 1 : 0;
    summary.fallbacks += step.decision.theta == 0 ? 1 : 0;
    for (const double error : step.q_errors) {
      const auto share = 1.0 / static_cast<double>(step.q_errors.size());
      summary.mean_q_error += share * error;
      summary.q_above += error > target ? share : 0;
    }
    bytes += static_cast<double>(step.decision.key_bytes + step.decision.value_bytes);
    bf16 += 4.0 * (trace_->positions[step.row] + 1) * trace_->shape.head_dim;
  }
  const auto count = static_cast<double>(steps.size());
  for (double* mean : {&summary.mean_error, &summary.above, &summary.mean_q_error, &summary.q_above,
                       &summary.fallbacks}) {
    *mean /= count;
  }
  summary.bytes = bytes / bf16;
  return summary;
}

}  // namespace adaattn

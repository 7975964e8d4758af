#include "server/decision_summary.h"

#include <algorithm>
#include <cmath>

namespace adaattn {
namespace {

struct PageSums {
  int64_t key_pages = 0;
  int64_t key_bits = 0;
  int64_t rank = 0;
  int64_t value_pages = 0;
  int64_t value_bits = 0;
};

void AddPages(const HeadDecision& head, int32_t head_dim, PageSums* sums) {
  for (int32_t i = 0; i < kNumKeyDepths; ++i) {
    const int64_t pages = head.key_pages[i];
    if (pages == 0) continue;
    sums->key_pages += pages;
    sums->key_bits += pages * KeyDepthBits(i);
    sums->rank += pages * ChunkedRank(head_dim, KeyDepthChunks(i));
  }
  for (int32_t i = 0; i < kNumValueDepths; ++i) {
    sums->value_pages += head.value_pages[i];
    sums->value_bits += int64_t{head.value_pages[i]} * 2 * i;
  }
}

Fallback FallbackOf(BoundDepth depth) {
  switch (depth) {
    case BoundDepth::kPolicy:
      return Fallback::kNone;
    case BoundDepth::kStoredBits:
      return Fallback::kStoredBits;
    case BoundDepth::kExactPages:
      return Fallback::kExactPages;
    case BoundDepth::kUnmet:
      break;
  }
  return Fallback::kBoundUnmet;
}

Fallback FallbackOf(const DecisionSummary& summary, PageFormat format,
                    const ResolvedOptions& options, bool any_zero_theta, bool raised,
                    BoundDepth depth) {
  if (options.mode == AttendMode::kDeterministic) return FallbackOf(depth);
  if (!IsProgressive(format) || options.mode != AttendMode::kStatistical) {
    return Fallback::kNone;
  }
  if (summary.pages_sealed == 0) return Fallback::kNoBasis;
  if (FollowsBudget(options.decision.policy) && any_zero_theta) return Fallback::kBudget;
  return raised ? Fallback::kPressure : Fallback::kNone;
}

}  // namespace

DecisionSummary Summarize(absl::Span<const HeadDecision> heads, const AttentionShape& shape,
                          PageFormat format, const ResolvedOptions& options, bool raised) {
  DecisionSummary summary;
  PageSums sums;
  double squared_error = 0;
  int64_t tokens = 0;
  bool any_zero_theta = false;
  BoundDepth depth = BoundDepth::kPolicy;  // the deepest
  for (const HeadDecision& head : heads) {
    AddPages(head, shape.head_dim, &sums);
    summary.pages_skipped += head.value_pages[0] - head.exact_pages;
    summary.exact_pages += head.exact_pages;
    summary.error_bound = std::max(summary.error_bound, head.error_bound);
    summary.lse_below = std::max(summary.lse_below, head.lse_below);
    summary.lse_above = std::max(summary.lse_above, head.lse_above);
    depth = std::max(depth, head.bound_depth);
    summary.theta += head.theta;
    summary.entropy += head.entropy;
    squared_error += double{head.predicted_error} * head.predicted_error;
    summary.bytes_read += head.key_bytes + head.value_bytes;
    summary.basis_bytes += head.basis_bytes;
    tokens += head.dense_tokens;
    any_zero_theta |= head.theta == 0;
  }
  const auto num_heads = static_cast<double>(heads.size());
  summary.pages_sealed = sums.value_pages;
  summary.theta /= num_heads;
  summary.entropy /= num_heads;
  summary.predicted_error = std::sqrt(squared_error / num_heads);
  tokens += sums.value_pages * kPageTokens;
  summary.bytes_bf16 = tokens * 2 * shape.head_dim * DTypeBytes(DType::kBf16);
  const auto mean = [](int64_t sum, int64_t pages, int32_t otherwise) {
    return pages == 0 ? otherwise : static_cast<double>(sum) / static_cast<double>(pages);
  };
  summary.mean_key_bits = mean(sums.key_bits, sums.key_pages, 16);
  summary.mean_value_bits = mean(sums.value_bits, sums.value_pages, 16);
  summary.mean_rank = mean(sums.rank, sums.key_pages, shape.head_dim);
  summary.fallback = FallbackOf(summary, format, options, any_zero_theta, raised, depth);
  const bool aims =
      options.mode == AttendMode::kStatistical && AimsAtError(options.decision.policy);
  if (aims || options.mode == AttendMode::kDeterministic) {
    summary.effective_target = options.decision.target_relative_error;
  }
  return summary;
}

float RaiseTarget(float target, float max, double queue_fraction, double threshold) {
  if (max <= target || queue_fraction <= threshold || threshold >= 1) return target;
  const double share = std::min(1.0, (queue_fraction - threshold) / (1 - threshold));
  return static_cast<float>(target * std::pow(max / target, share));
}

}  // namespace adaattn

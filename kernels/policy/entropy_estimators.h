#ifndef ADAATTN_KERNELS_POLICY_ENTROPY_ESTIMATORS_H_
#define ADAATTN_KERNELS_POLICY_ENTROPY_ESTIMATORS_H_

// Three ways to know the entropy of one row's attention, in nats, over pages of kPageTokens scores.
//   exact    every score: H = L - sum_t p_t s_t, L the log sum of exponentials
//   proxy    page shares alone: entropy of the shares, never above the exact one and at most
//            ln(kPageTokens) below
//   sampled  page shares for where the mass is, and for what lies inside, pages drawn by their
//            share. By the chain rule (Cover and Thomas, Elements of Information Theory, 2.2),
//            H = H(pages) + sum_p share_p H_p with H_p the entropy inside page p. That sum is the
//            mean of H_p over pages drawn with probability share_p, so it is unbiased however few
//            are drawn, and each draw lies in [0, ln(kPageTokens)].
// The confidence interval is Student's t's normal limit, estimate +- 1.96 standard errors, cut to
// the bounds that hold in any case: [proxy, proxy + ln(kPageTokens)].
// Pages are drawn with policy/counter_random.h: those of kernels/cuda/estimators.h are the same.

#include <cmath>
#include <cstdint>

#include "absl/types/span.h"
#include "kernels/format/page_layout.h"
#include "kernels/host_device.h"
#include "kernels/policy/counter_random.h"

namespace adaattn {

struct EntropyEstimate {
  double entropy = 0;  // nats
  double low = 0;      // about 95 % of the time low <= exact <= high
  double high = 0;
  int32_t pages_read = 0;  // whose scores were looked at; a page drawn twice counts once
};

// `scores` in nats, any number >= 0; -inf is a token that the row does not see. No mass: 0.
double ExactAttentionEntropy(absl::Span<const float> scores);

// `page_lse` log sum of exponentials of each page.
double ProxyAttentionEntropy(absl::Span<const double> page_lse);

inline constexpr double kMaxPageEntropy = 4.1588830833596715;  // ln(kPageTokens)

// Draw `draw` of a seed from pages of the given shares: the first whose sum of shares exceeds a
// uniform number times the whole. `sum` is that whole, added up in order.
ADAATTN_HD int32_t DrawPage(const double* shares, int32_t num_pages, double sum, uint64_t seed,
                            int32_t draw) {
  const double at = UniformAt(seed, static_cast<uint64_t>(draw), 0) * sum;
  double before = 0;
  int32_t page = 0;
  for (int32_t i = 0; i < num_pages; ++i) {
    if (!(shares[i] > 0)) continue;
    page = i;  // of rounding the last one
    before += shares[i];
    if (at < before) break;
  }
  return page;
}

// The estimate from `between`, the pages' own entropy, and the entropies inside those drawn.
ADAATTN_HD EntropyEstimate EntropyOfDraws(double between, const double* inside, int32_t num_draws) {
  double sum = 0, spread = 0;
  for (int32_t i = 0; i < num_draws; ++i) sum += inside[i];
  const double mean = sum / num_draws;
  double half = kMaxPageEntropy;  // one draw says nothing of its spread
  if (num_draws > 1) {
    // Around the mean: where all draws are alike, a difference of sums would leave its rounding.
    for (int32_t i = 0; i < num_draws; ++i) spread += (inside[i] - mean) * (inside[i] - mean);
    half = kNormalQuantile * sqrt(spread / (num_draws - 1) / num_draws);
  }
  EntropyEstimate estimate;
  estimate.entropy = between + mean;
  estimate.low = between + (mean > half ? mean - half : 0.0);
  estimate.high = between + (mean + half < kMaxPageEntropy ? mean + half : kMaxPageEntropy);
  return estimate;
}

// Draws `num_draws` >= 1 pages: the same seed, the same draws.
// `page_lse` of each page of `scores` in order; only the last page may be short.
EntropyEstimate SampledAttentionEntropy(absl::Span<const float> scores,
                                        absl::Span<const double> page_lse, int32_t num_draws,
                                        uint64_t seed);

// One of them by name; the interval of the exact one is a point, the proxy's its bound.
enum class EntropyMethod { kExact, kProxy, kSampled };
EntropyEstimate EstimateEntropy(absl::Span<const float> scores, absl::Span<const double> page_lse,
                                EntropyMethod method, int32_t num_draws, uint64_t seed);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_ENTROPY_ESTIMATORS_H_

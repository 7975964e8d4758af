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

#include <cstdint>

#include "absl/types/span.h"

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

// Draws `num_draws` >= 1 pages with a generator seeded by `seed`: the same seed, the same draws.
// `page_lse` of each page of `scores` in order; only the last page may be short.
EntropyEstimate SampledAttentionEntropy(absl::Span<const float> scores,
                                        absl::Span<const double> page_lse, int32_t num_draws,
                                        uint64_t seed);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_ENTROPY_ESTIMATORS_H_

#ifndef ADAATTN_KERNELS_POLICY_ENTROPY_H_
#define ADAATTN_KERNELS_POLICY_ENTROPY_H_

// Entropy of attention, in nats, from log masses: H = sum_i p_i (L - l_i) with p_i = exp(l_i - L)
// and L the log of the sum of all masses. Over tokens it is exact; over pages (and dense tokens as
// single items) it is the proxy that the scan gives for nothing, at most ln(64) lower.

#include <cmath>
#include <cstdint>

#include "absl/types/span.h"
#include "kernels/host_device.h"

namespace adaattn {

// One item's part of the entropy. No mass (log_mass or global_lse -inf) gives 0.
ADAATTN_HD float EntropyTerm(float log_mass, float global_lse) {
  const float depth = global_lse - log_mass;
  return depth < 1e30f ? expf(-depth) * depth : 0.0f;
}

// log sum exp of `log_masses`; -inf where there is none or all are -inf.
double LogSumExp(absl::Span<const double> log_masses);

// Entropy of the distribution that `log_masses` make. 0 where there is no mass.
double Entropy(absl::Span<const double> log_masses);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_ENTROPY_H_

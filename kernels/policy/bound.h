#ifndef ADAATTN_KERNELS_POLICY_BOUND_H_
#define ADAATTN_KERNELS_POLICY_BOUND_H_

// The deterministic error bound: how far an output can be from exact attention over the same
// tokens, given how far each score and each value can be. It bounds; error_model.h predicts.
//
// Let w_j be the weights that were used, v'_j the values, o = sum w_j v'_j / sum w_j the output;
// the true weights are w_j exp(t_j) with |t_j| <= e_j, the true values lie within d_j of v'_j. For
// every direction u, g_j = u.(v'_j - o) sums to 0 under the weights, and the true output is off by
//
//   u.(o* - o) = sum w_j exp(t_j) (g_j + h_j) / sum w_j exp(t_j),   |h_j| <= d_j
//
// which is at most L iff sum w_j exp(t_j) (g_j + h_j - L) <= 0 for all t, h and g. The worst t and
// h are at their ends; the sum is then convex in g_j, so that with any multiplier c for the
// constraint sum w_j g_j = 0 its worst lies at g_j = +-r_j, r_j >= |v'_j - o|. With one c the least
// such L costs a bisection. For one e and no d it is r tanh(e), which is attained.
//
// In double precision; bound_terms.h is what host and device share.

#include <cstdint>

#include "absl/types/span.h"
#include "kernels/policy/bound_terms.h"

namespace adaattn {

// An upper bound on |o* - o|, L2.
double OutputErrorBound(absl::Span<const BoundTerm> terms);

// The true log sum of exponentials lies in [lse - below, lse + above], nats.
struct LseBound {
  double below = 0;
  double above = 0;
};
LseBound BoundLse(absl::Span<const BoundTerm> terms);

// The ranges of one page of keys under one query.
//   query       [head_dim]
//   key_scales  [head_dim] scale bytes
KeyRanges SumKeyRanges(const float* query, const uint8_t* key_scales, int32_t head_dim);

// Likewise for a page's values.
struct ValueRanges {
  double token = 0;  // max over tokens of sqrt(sum over channels of r^2)
  double page = 0;   // sqrt(sum over channels of the largest r^2 of any token)
  bool saturated = false;
};
//   value_scales  [64, ValueGroups(head_dim)] scale bytes
ValueRanges SumValueRanges(const uint8_t* value_scales, int32_t head_dim);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_BOUND_H_

#ifndef ADAATTN_KERNELS_POLICY_BOUND_TERMS_H_
#define ADAATTN_KERNELS_POLICY_BOUND_TERMS_H_

// The terms of an error bound (bound.h) from what is stored and from what arithmetic rounds. Pure
// functions in double precision, host and device alike.

#include <cmath>
#include <cstdint>

#include "kernels/format/nested_code.h"
#include "kernels/format/page_layout.h"
#include "kernels/host_device.h"

namespace adaattn {

// Keys that share their errors, as one row of q sees them: a sealed page, or dense tokens.
struct BoundTerm {
  double mass = 0;         // sum of their w_j over the row's; all terms together: 1
  double score_error = 0;  // e_j, nats, >= 0; infinite: nothing is known of their weights
  double value_error = 0;  // d_j, L2
  double distance = 0;     // r_j, L2
};

// n products summed in FP32 are off by at most n times this times the sum of their magnitudes.
inline constexpr double kUnit = 0x1p-24;
// Nats: exp, the subtraction of the maximum, the rescaling and the sums of a page; of the cap.
inline constexpr double kSoftmaxError = 2e-5;
inline constexpr double kSoftcapError = 1e-6;
// Hadamard rotations in FP32, when sealing and after attending, relative to a vector's norm.
inline constexpr double kFrameError = 1e-6;

ADAATTN_HD constexpr double SoftmaxError(float softcap) {
  return kSoftmaxError + kSoftcapError * static_cast<double>(softcap);
}

// |x - x_b| <= CodeError(bits) r for the nested code, its arithmetic in FP32 included:
// (x / r + 1) * 128 is off by at most 2^-16 cells of 8 bits, the decoded value by 2^-22.
ADAATTN_HD constexpr double CodeError(int32_t bits) {
  return (1 + 0x1p-12) / static_cast<double>(1 << bits);
}

// What bounds the score of one rotated query (q Q) on one page's keys, from the page's ranges.
struct KeyRanges {
  double weighted = 0;     // sum_c |q_c| r_c
  double largest = 0;      // max_c |q_c| r_c
  double sum = 0;          // sum_c r_c
  double squares = 0;      // sum_c r_c^2
  double query_sum = 0;    // sum_c |q_c|
  bool saturated = false;  // some range is the largest there is: its channel may exceed it
};

inline constexpr uint8_t kLargestScale = 255;

ADAATTN_HD void AddKeyRange(float query, uint8_t scale, KeyRanges* ranges) {
  const double range = RangeFromScale(scale);
  const double q = fabs(static_cast<double>(query));
  ranges->weighted += q * range;
  ranges->largest = q * range > ranges->largest ? q * range : ranges->largest;
  ranges->sum += range;
  ranges->squares += range * range;
  ranges->query_sum += q;
  ranges->saturated = ranges->saturated || scale == kLargestScale;
}

// e of a sealed page for one query.
//   mean_score  q.mu
//   half_step   of the weights that multiply codes, relative to their largest; 0 where they are
//   FP32
ADAATTN_HD double SealedScoreError(const KeyRanges& ranges, double query_norm, double mean_score,
                                   int32_t head_dim, int32_t key_bits, double half_step,
                                   float softmax_scale, float softcap) {
  if (ranges.saturated) return HUGE_VAL;
  // Rotating q and k in FP32, the sums, and q.mu; |k - mu| <= 1.25 norm, and 1.2 covers bases that
  // are orthonormal to their tolerance only.
  const double rounding = (head_dim + 16) * kUnit * 1.5 *
                          (query_norm * ranges.sum + sqrt(ranges.squares) * ranges.query_sum +
                           ranges.weighted + fabs(mean_score));
  const double raw =
      ranges.weighted * CodeError(key_bits) + head_dim * half_step * ranges.largest + rounding;
  return static_cast<double>(softmax_scale) * raw + SoftmaxError(softcap);
}

// A sealed page for one row.
struct SealedFacts {
  double mass = 0;
  double score_error = 0;  // at the depth at which its keys were read
  double mean_shift = 0;   // |log mass that stands for it - lse of its scores|, where skipped
  double to_mean = 0;      // |mean - o|
  double radius = 0;       // as stored, and what storing it rounded
  int32_t value_bits = 0;  // 0: the mean stands for the values
  double token_range = 0;  // max over tokens of sqrt(sum over channels of r^2); read: only then
  bool saturated = false;  // some value range is the largest there is
};

// norm: of o.
ADAATTN_HD BoundTerm SealedTerm(const SealedFacts& page, double norm) {
  BoundTerm term;
  term.mass = page.mass;
  term.score_error = page.score_error;
  term.value_error = kFrameError * (page.to_mean + page.radius + norm);
  if (page.value_bits == 0) {
    // The page's weights were scaled together.
    if (page.mass > 0) term.score_error += page.mean_shift;
    term.value_error += page.radius;
    term.distance = page.to_mean;
    return term;
  }
  term.value_error =
      page.saturated ? HUGE_VAL : term.value_error + page.token_range * CodeError(page.value_bits);
  term.distance = page.to_mean + page.radius + term.value_error;
  return term;
}

// Dense tokens for one row.
//   dot_terms  products that one FP32 sum of a score takes
//   key, value  the largest norms among them
//   norm       of o
ADAATTN_HD BoundTerm DenseTerm(double mass, double dot_terms, double query_norm, double key,
                               double value, double norm, float softmax_scale, float softcap) {
  BoundTerm term;
  term.mass = mass;
  term.score_error =
      static_cast<double>(softmax_scale) * (dot_terms + 24) * kUnit * 1.1 * query_norm * key +
      SoftmaxError(softcap);
  term.value_error = 2 * kUnit * value;  // FP8: the value scale's product
  term.distance = value + norm;
  return term;
}

// What sums of weighted values in FP32 are off by: `chain` products each; `reach` is the largest
// distance of a value from o.
ADAATTN_HD constexpr double ValueSumError(double chain, double reach, double norm) {
  return chain * kUnit * 1.1 * (reach + 2 * norm);
}

// Worst L2 error of rounding an output of norm `norm` to `type`. FP16 saturates beyond its range.
ADAATTN_HD double OutputRounding(DType type, double norm, int32_t head_dim) {
  if (type == DType::kF32) return kUnit * norm;
  if (type == DType::kBf16) return 0x1p-8 * norm;
  if (norm > static_cast<double>(kFp16Max)) return HUGE_VAL;
  return 0x1p-11 * norm + 0x1p-25 * sqrt(static_cast<double>(head_dim));
}

// Of a row's log-sum-exp itself.
ADAATTN_HD double LseRounding(double lse) { return 8 * kUnit * (fabs(lse) + 1) + kSoftmaxError; }

// |o* - o| <= error as a bound relative to |o*|, which is at least |o| - error; infinity where o
// may be all error. 0 without error.
ADAATTN_HD double RelativeBound(double error, double output_norm) {
  if (error == 0) return 0;
  return error < output_norm ? error / (output_norm - error) : HUGE_VAL;
}

// The largest error whose RelativeBound is at most `bound`.
ADAATTN_HD double MostError(double bound, double output_norm) {
  return output_norm * bound / (1 + bound);
}

// --- The least bound that no choice of weights, values and directions exceeds: bound.h ----------

inline constexpr int32_t kBoundBisections = 30;  // a billionth of the trivial bound

// A term with its exponentials.
struct PreparedTerm {
  BoundTerm term;
  double up = 1;    // exp(e)
  double down = 1;  // exp(-e)
};

ADAATTN_HD PreparedTerm PrepareTerm(const BoundTerm& term) {
  constexpr double kMost = 300;  // exp of it is as good as infinity beside any mass
  PreparedTerm prepared;
  prepared.term = term;
  prepared.up = exp(term.score_error < kMost ? term.score_error : kMost);
  prepared.down = 1 / prepared.up;
  return prepared;
}

// max over t and h of exp(t) (g + h - bound).
ADAATTN_HD constexpr double WorstOfTerm(const PreparedTerm& p, double g, double bound) {
  const double x = g + p.term.value_error - bound;
  return x * (x > 0 ? p.up : p.down);
}

// The term's part of a sum that is at most 0 where `bound` holds.
ADAATTN_HD constexpr double ExcessOfTerm(const PreparedTerm& p, double multiplier, double bound) {
  const double shift = multiplier * p.term.distance;
  const double near = WorstOfTerm(p, p.term.distance, bound) - shift;
  const double far = WorstOfTerm(p, -p.term.distance, bound) + shift;
  return p.term.mass * (near > far ? near : far);
}

// Sums over the terms that have mass. The best multiplier of equal terms is 1 / cosh(e).
struct BoundSums {
  double trivial = 0;     // the largest; o* is a mean of the true values, whatever the weights
  double weight = 0;      // sum of mass distance
  double multiplier = 0;  // sum of mass distance / cosh(e)
  double up = 0;          // sum of mass exp(e), exp(-e)
  double down = 0;
};

ADAATTN_HD void AddBoundTerm(const PreparedTerm& p, BoundSums* sums) {
  if (p.term.mass == 0) return;
  const double most = p.term.distance + p.term.value_error;
  sums->trivial = most > sums->trivial ? most : sums->trivial;
  sums->weight += p.term.mass * p.term.distance;
  sums->multiplier += p.term.mass * p.term.distance * 2 / (p.up + p.down);
  sums->up += p.term.mass * exp(p.term.score_error);
  sums->down += p.term.mass * exp(-p.term.score_error);
}

ADAATTN_HD double BoundMultiplier(const BoundSums& sums) {
  return sums.weight > 0 ? sums.multiplier / sums.weight : 1;
}

// Whether `bound` bounds |o* - o|; excess(multiplier, bound) is the sum of ExcessOfTerm over the
// terms with mass. Every lane of a warp that sums takes the same way.
template <class Excess>
ADAATTN_HD bool BoundHolds(const BoundSums& sums, const Excess& excess, double bound) {
  if (sums.trivial <= bound) return true;
  if (!(sums.trivial < HUGE_VAL) || !(bound > 0)) return false;
  return excess(BoundMultiplier(sums), bound) <= 0;
}

// An upper bound on |o* - o|, to a billionth of the trivial one the least for which BoundHolds.
template <class Excess>
ADAATTN_HD double LeastBound(const BoundSums& sums, const Excess& excess) {
  if (!(sums.trivial < HUGE_VAL)) return sums.trivial;
  const double multiplier = BoundMultiplier(sums);
  double below = 0, bound = sums.trivial;
  for (int32_t i = 0; i < kBoundBisections; ++i) {
    const double middle = 0.5 * (below + bound);
    (excess(multiplier, middle) <= 0 ? bound : below) = middle;
  }
  return bound;
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_BOUND_TERMS_H_

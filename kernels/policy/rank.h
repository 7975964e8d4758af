#ifndef ADAATTN_KERNELS_POLICY_RANK_H_
#define ADAATTN_KERNELS_POLICY_RANK_H_

// How many directions keys, or the values of a page, really use. With singular values s_i of a
// matrix X [rows, dim] and p_i = s_i^2 / sum s^2:
//   effective rank   exp(-sum p_i ln p_i)          (Roy and Vetterli, The effective rank, 2007;
//                    over energies p_i, where that paper takes singular values)
//   rank at energy   fewest directions that hold `energy` of sum s^2
//   stable rank      sum s^2 / s_1^2               (Rudelson and Vershynin, 2007)
// Estimators, from cheap to exact:
//   power iteration  s_1 alone, hence the stable rank (Golub and Van Loan, Matrix Computations,
//                    8.2); converges from below
//   randomized SVD   range finder with power steps and a small SVD (Halko, Martinsson and Tropp,
//                    Finding structure with randomness, 2011, algorithms 4.4 and 5.1); what lies
//                    outside the range is spread evenly over the remaining directions
//   Hutchinson       trace of a function of G = X^T X / tr by Rademacher probes (Hutchinson, A
//                    stochastic estimator of the trace, 1990): z^T f(G) z by Lanczos quadrature
//                    (Ubaru, Chen and Saad, Fast estimation of tr(f(A)) via stochastic Lanczos
//                    quadrature, 2017), f(x) = -x ln x; error bars from the spread of the probes
//   spectrum         all s_i, from the eigenvalues of X^T X; a fitted basis has them already as
//                    its channels' energies (RankOfSpectrum)
// Double precision. Any finite X is fine: no rows, constant rows, one row many times. X is taken as
// it is: subtract a mean first where one is meant. Random numbers are policy/counter_random.h's, so
// the estimators of kernels/cuda/estimators.h draw the same.

#include <cmath>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/host_device.h"
#include "kernels/policy/counter_random.h"

namespace adaattn {

// A matrix of `rows` times `dim` floats, row-major.
struct RowsView {
  absl::Span<const float> values;
  int32_t dim = 0;

  int64_t rows() const { return dim > 0 ? static_cast<int64_t>(values.size()) / dim : 0; }
};

struct RankEstimate {
  double rank = 0;  // 0 where X is 0
  double low = 0;   // about 95 % of the time low <= exact <= high; equal to rank where it is exact
  double high = 0;
};

// One part of an entropy, in nats. 0 of no share.
ADAATTN_HD double ShareEntropy(double share) { return share > 0 ? -share * log(share) : 0.0; }

// Effective rank where `count` energies are known, and what else of `trace` there is lies in
// `unseen` further directions: evenly in all of them, the most that it can be, or in one (`low`).
ADAATTN_HD RankEstimate RankOfFoundEnergies(const double* energies, int32_t count, double trace,
                                            int64_t unseen) {
  RankEstimate estimate;
  double found = 0;
  for (int32_t i = 0; i < count; ++i) found += energies[i];
  const double rest = unseen > 0 && trace > found ? trace - found : 0.0;
  const double total = found + rest;
  if (!(total > 0)) return estimate;
  double entropy = 0;
  for (int32_t i = 0; i < count; ++i) entropy += ShareEntropy(energies[i] / total);
  estimate.low = exp(entropy + ShareEntropy(rest / total));
  const double even = unseen > 0 ? static_cast<double>(unseen) : 1.0;
  estimate.rank = estimate.high = exp(entropy + even * ShareEntropy(rest / total / even));
  return estimate;
}

// Effective rank from the entropies that `probes` >= 2 probes say.
ADAATTN_HD RankEstimate RankOfProbes(const double* entropies, int32_t probes) {
  double sum = 0, squares = 0;
  for (int32_t i = 0; i < probes; ++i) {
    sum += entropies[i];
    squares += entropies[i] * entropies[i];
  }
  const double mean = sum / probes, spread = squares - sum * mean;
  const double variance = (spread > 0 ? spread : 0.0) / (probes - 1);
  const double half = kNormalQuantile * sqrt(variance / probes);
  return RankEstimate{exp(mean), exp(mean - half), exp(mean + half)};
}

// Stable rank from an iterate's energy, which is at most that of the first direction.
ADAATTN_HD RankEstimate StableRankOf(double trace, double energy) {
  if (!(energy > 0)) return RankEstimate();
  return RankEstimate{trace / energy, 1.0, trace / energy};
}

// Effective rank from energies s_i^2 >= 0 in any order (not normalised), such as Basis::energy.
double RankOfSpectrum(absl::Span<const double> energies);

// Fewest of `energies` that hold the share `energy` in (0, 1] of their sum.
int32_t RankAtEnergy(absl::Span<const double> energies, double energy);

// Squares of the singular values of X, descending, [min(rows, dim)] of them padded with 0 to dim.
std::vector<double> ExactSpectrum(const RowsView& x);

// Stable rank by power iteration on X^T X from a random start. `low` is what the last iterate
// proves: the norm that it reached is never above s_1, so the stable rank is at most `high`.
RankEstimate StableRankByPower(const RowsView& x, int32_t iterations, uint64_t seed);

// Effective rank by randomized SVD: a range of `range` directions (oversampling included), after
// `power_steps` multiplications by X^T X.
RankEstimate RankByRandomizedSvd(const RowsView& x, int32_t range, int32_t power_steps,
                                 uint64_t seed);

// Effective rank by stochastic Lanczos quadrature: `probes` >= 2 Rademacher vectors, `steps` of
// Lanczos each. The interval is that of the probes' mean, carried through the exponential.
RankEstimate RankByHutchinson(const RowsView& x, int32_t probes, int32_t steps, uint64_t seed);

// One of them by name.
enum class RankMethod { kSpectrum, kRandomizedSvd, kHutchinson, kPower };
struct RankOptions {
  RankMethod method = RankMethod::kSpectrum;
  int32_t range = 0;        // randomized SVD
  int32_t power_steps = 0;  // likewise
  int32_t probes = 0;       // Hutchinson
  int32_t steps = 0;        // likewise
  int32_t iterations = 0;   // power iteration, which estimates the stable rank
};
RankEstimate EstimateRank(const RowsView& x, const RankOptions& options, uint64_t seed);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_RANK_H_

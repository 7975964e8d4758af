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
// Host code in double precision. Any finite X is fine: no rows, constant rows, one row many times.
// X is taken as it is: subtract a mean first where one is meant.

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

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

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_RANK_H_

#ifndef ADAATTN_KERNELS_CUDA_ESTIMATOR_TEAM_H_
#define ADAATTN_KERNELS_CUDA_ESTIMATOR_TEAM_H_

// What the estimators need of a CTA. A Team is as in bounded_pages.h: thread, num_threads, warp,
// num_warps, lane and kLanes, SyncCta, Sum and Max over a warp. On the host a test gives threads.

#include <cmath>
#include <cstdint>

#include "kernels/host_device.h"

namespace adaattn {

inline constexpr int32_t kEstimatorThreads = 256;
inline constexpr int32_t kMaxTeamWarps = kEstimatorThreads / 32;

// The sum of term(i) for i < count by the whole CTA, the same in all threads; `sums`
// [kMaxTeamWarps] is scratch that they share. What was written before it is seen after it.
template <class Team, class Term>
ADAATTN_HD double CtaSum(const Team& team, int64_t count, const Term& term, double* sums) {
  double sum = 0;
  for (int64_t i = team.thread; i < count; i += team.num_threads) sum += term(i);
  sum = team.Sum(sum);
  team.SyncCta();
  if (team.lane == 0) sums[team.warp] = sum;
  team.SyncCta();
  double total = 0;
  for (int32_t i = 0; i < team.num_warps; ++i) total += sums[i];
  return total;
}

// Likewise the largest; -inf of none.
template <class Team, class Term>
ADAATTN_HD double CtaMax(const Team& team, int64_t count, const Term& term, double* sums) {
  double high = -HUGE_VAL;
  for (int64_t i = team.thread; i < count; i += team.num_threads) {
    const double x = term(i);
    high = x > high ? x : high;
  }
  high = team.Max(high);
  team.SyncCta();
  if (team.lane == 0) sums[team.warp] = high;
  team.SyncCta();
  double top = -HUGE_VAL;
  for (int32_t i = 0; i < team.num_warps; ++i) top = sums[i] > top ? sums[i] : top;
  return top;
}

// x . y by a warp, in all its lanes.
template <class Team>
ADAATTN_HD double WarpDot(const Team& team, const double* x, const double* y, int32_t count) {
  double sum = 0;
  for (int32_t i = team.lane; i < count; i += Team::kLanes) sum += x[i] * y[i];
  return team.Sum(sum);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_ESTIMATOR_TEAM_H_

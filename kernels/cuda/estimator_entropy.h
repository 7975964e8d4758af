#ifndef ADAATTN_KERNELS_CUDA_ESTIMATOR_ENTROPY_H_
#define ADAATTN_KERNELS_CUDA_ESTIMATOR_ENTROPY_H_

// The estimators of policy/entropy_estimators.h, a CTA to a row. Sums are FP64: with the largest
// log mass m, H = ln sum exp(l - m) - sum exp(l - m) (l - m) / sum exp(l - m).

#include <cmath>
#include <cstdint>

#include "kernels/cuda/estimator_team.h"
#include "kernels/cuda/estimators.h"
#include "kernels/format/page_layout.h"
#include "kernels/policy/entropy_estimators.h"

namespace adaattn {

struct EntropyShared {
  double sums[kMaxTeamWarps];
  double inside[kMaxEntropyDraws];
  int32_t drawn[kMaxEntropyDraws];
};

// exp(x - high); 0 of -inf.
ADAATTN_HD double MassBelow(double x, double high) { return x > -HUGE_VAL ? exp(x - high) : 0.0; }
// exp(x - high) (x - high); 0 of -inf.
ADAATTN_HD double MassMoment(double x, double high) {
  return x > -HUGE_VAL ? exp(x - high) * (x - high) : 0.0;
}

template <class Team>
class EntropyRow {
 public:
  ADAATTN_HD EntropyRow(const EntropyParams& params, int32_t row, const Team& team,
                        EntropyShared& shared)
      : p_(params),
        row_(row),
        tokens_(params.tokens[row]),
        pages_((tokens_ + kPageTokens - 1) / kPageTokens),
        scores_(params.scores + row * params.score_stride),
        team_(team),
        shared_(shared) {}

  ADAATTN_HD void Run() {
    const double* lse = p_.page_lse + row_ * p_.page_stride;
    EntropyEstimate estimate;
    if (p_.method == EntropyMethod::kExact) {
      bool any = false;
      estimate.entropy = OfCta(
          tokens_, [&](int64_t i) { return static_cast<double>(scores_[i]); }, &any);
      estimate.low = estimate.high = estimate.entropy;
      estimate.pages_read = pages_;
    } else {
      bool any = false;
      const double between = OfCta(
          pages_, [&](int64_t i) { return lse[i]; }, &any);
      estimate.entropy = estimate.low = estimate.high = between;
      if (any && p_.method == EntropyMethod::kProxy) estimate.high += kMaxPageEntropy;
      if (any && p_.method == EntropyMethod::kSampled) estimate = Sampled(lse, between);
    }
    if (team_.thread == 0) p_.out[row_] = estimate;
  }

  // The log sum of exponentials of every page, a warp each.
  ADAATTN_HD void SumPages(double* page_lse) const {
    for (int32_t page = team_.warp; page < pages_; page += team_.num_warps) {
      const float* scores = scores_ + int64_t{page} * kPageTokens;
      const int32_t count = TokensOf(page);
      double high = -HUGE_VAL, sum = 0;
      for (int32_t i = team_.lane; i < count; i += Team::kLanes) {
        high = static_cast<double>(scores[i]) > high ? static_cast<double>(scores[i]) : high;
      }
      high = team_.Max(high);
      for (int32_t i = team_.lane; i < count; i += Team::kLanes) {
        sum += MassBelow(static_cast<double>(scores[i]), high);
      }
      sum = team_.Sum(sum);
      if (team_.lane == 0) {
        page_lse[row_ * p_.page_stride + page] = sum > 0 ? high + log(sum) : -HUGE_VAL;
      }
    }
  }

 private:
  ADAATTN_HD int32_t TokensOf(int32_t page) const {
    const int32_t left = tokens_ - page * kPageTokens;
    return left < kPageTokens ? left : kPageTokens;
  }

  // Of `count` log masses, in all threads; whether there is any mass.
  template <class LogMass>
  ADAATTN_HD double OfCta(int64_t count, const LogMass& log_mass, bool* any) const {
    const double high = CtaMax(team_, count, log_mass, shared_.sums);
    *any = high > -HUGE_VAL;
    if (!*any) return 0;
    const double sum = CtaSum(
        team_, count, [&](int64_t i) { return MassBelow(log_mass(i), high); }, shared_.sums);
    const double moment = CtaSum(
        team_, count, [&](int64_t i) { return MassMoment(log_mass(i), high); }, shared_.sums);
    return log(sum) - moment / sum;
  }

  // Inside one page, by a warp.
  ADAATTN_HD double OfPage(int32_t page) const {
    const float* scores = scores_ + int64_t{page} * kPageTokens;
    const int32_t count = TokensOf(page);
    double high = -HUGE_VAL, sum = 0, moment = 0;
    for (int32_t i = team_.lane; i < count; i += Team::kLanes) {
      high = static_cast<double>(scores[i]) > high ? static_cast<double>(scores[i]) : high;
    }
    high = team_.Max(high);
    if (!(high > -HUGE_VAL)) return 0;
    for (int32_t i = team_.lane; i < count; i += Team::kLanes) {
      sum += MassBelow(static_cast<double>(scores[i]), high);
      moment += MassMoment(static_cast<double>(scores[i]), high);
    }
    sum = team_.Sum(sum);
    moment = team_.Sum(moment);
    return log(sum) - moment / sum;
  }

  ADAATTN_HD EntropyEstimate Sampled(const double* lse, double between) const {
    double* shares = p_.workspace + row_ * p_.page_stride;
    const double high = CtaMax(
        team_, pages_, [&](int64_t i) { return lse[i]; }, shared_.sums);
    for (int32_t i = team_.thread; i < pages_; i += team_.num_threads) {
      shares[i] = MassBelow(lse[i], high);
    }
    team_.SyncCta();
    // As the host adds them up: a draw next to a page's edge falls to the same side.
    if (team_.thread == 0) {
      double sum = 0;
      for (int32_t i = 0; i < pages_; ++i) sum += shares[i];
      shared_.sums[0] = sum;
    }
    team_.SyncCta();
    const double sum = shared_.sums[0];
    const uint64_t seed = p_.seed + static_cast<uint64_t>(row_);
    for (int32_t draw = team_.thread; draw < p_.num_draws; draw += team_.num_threads) {
      shared_.drawn[draw] = DrawPage(shares, pages_, sum, seed, draw);
    }
    team_.SyncCta();
    for (int32_t draw = team_.warp; draw < p_.num_draws; draw += team_.num_warps) {
      const double inside = OfPage(shared_.drawn[draw]);
      if (team_.lane == 0) shared_.inside[draw] = inside;
    }
    team_.SyncCta();
    EntropyEstimate estimate = EntropyOfDraws(between, shared_.inside, p_.num_draws);
    for (int32_t draw = 0; draw < p_.num_draws; ++draw) {
      bool again = false;
      for (int32_t i = 0; i < draw; ++i) again |= shared_.drawn[i] == shared_.drawn[draw];
      estimate.pages_read += again ? 0 : 1;
    }
    return estimate;
  }

  const EntropyParams& p_;
  const int32_t row_, tokens_, pages_;
  const float* scores_;
  const Team& team_;
  EntropyShared& shared_;
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_ESTIMATOR_ENTROPY_H_

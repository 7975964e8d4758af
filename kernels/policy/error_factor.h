#ifndef ADAATTN_KERNELS_POLICY_ERROR_FACTOR_H_
#define ADAATTN_KERNELS_POLICY_ERROR_FACTOR_H_

// What audits say of a kv head's predictions, as a factor that the next ones are made with. Host
// code.
//
// Of a head's steps under a budget the logarithm x of actual over predicted error is near normal.
// The budget aims a prediction at kBudgetMargin of the target, so a step exceeds its target where
// exp(x) > 1 / kBudgetMargin. With predictions times
//   factor = kBudgetMargin exp(mean(x) + kErrorFactorDeviations deviation(x))
// that is where x lies so many deviations above its mean, for every head alike. A head that errs
// less than predicted, or always by as much, reads less; one that errs more, or anyhow, reads more.
// Mean and deviation count kPriorAudits steps as heads have them on average, of which the factor is
// 1: a few audits change little.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/policy/budget.h"

namespace adaattn {

inline constexpr double kErrorFactorDeviations = 1.645;  // 5 % of a normal distribution lie above
inline constexpr double kPriorAudits = 16;
// Within a head (docs/policies.md).
inline constexpr double kPriorDeviation = 0.35;
// Factors are at least 1 over this and at most this.
inline constexpr float kMostErrorFactor = 8;

// Audited steps of one kv head, as sums.
struct PredictionAudits {
  int64_t count = 0;
  double sum = 0;     // of log(actual / predicted)
  double square = 0;  // of its square

  // The relative errors of a step. Where either is 0 or no number it says nothing and is left out.
  void Add(float actual, float predicted) {
    if (!(actual > 0) || !(predicted > 0)) return;
    const double x = std::log(static_cast<double>(actual) / static_cast<double>(predicted));
    if (!std::isfinite(x)) return;
    ++count;
    sum += x;
    square += x * x;
  }
};

// What the head's predictions should be multiplied by, those that were audited having been made
// with `factor`.
inline float ErrorFactor(const PredictionAudits& audits, float factor = 1) {
  const double prior_mean =
      -std::log(double{kBudgetMargin}) - kErrorFactorDeviations * kPriorDeviation;
  const double n = static_cast<double>(audits.count) + kPriorAudits;
  const double mean = (audits.sum + kPriorAudits * prior_mean) / n;
  // About the head's own mean: how far that lies from the prior's is no spread of its steps.
  const double own_mean = audits.count > 0 ? audits.sum / static_cast<double>(audits.count) : 0;
  const double own = audits.square - static_cast<double>(audits.count) * own_mean * own_mean;
  const double variance =
      (std::max(own, 0.0) + kPriorAudits * kPriorDeviation * kPriorDeviation) / n;
  const double more = kBudgetMargin * std::exp(mean + kErrorFactorDeviations * std::sqrt(variance));
  return std::clamp(factor * static_cast<float>(more), 1 / kMostErrorFactor, kMostErrorFactor);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_ERROR_FACTOR_H_

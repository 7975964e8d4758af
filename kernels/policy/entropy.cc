#include "kernels/policy/entropy.h"

#include <algorithm>
#include <limits>

namespace adaattn {

double LogSumExp(absl::Span<const double> log_masses) {
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  double largest = kNone;
  for (const double value : log_masses) largest = std::max(largest, value);
  if (largest == kNone) return kNone;
  double sum = 0.0;
  for (const double value : log_masses) sum += std::exp(value - largest);
  return largest + std::log(sum);
}

double Entropy(absl::Span<const double> log_masses) {
  const double total = LogSumExp(log_masses);
  if (!std::isfinite(total)) return 0.0;
  double entropy = 0.0;
  for (const double value : log_masses) {
    const double depth = total - value;
    if (std::isfinite(depth)) entropy += std::exp(-depth) * depth;
  }
  return entropy;
}

}  // namespace adaattn

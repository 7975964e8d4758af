#include "server/histogram.h"

#include "absl/strings/str_cat.h"
#include "server/metric_registry.h"

namespace adaattn {

const std::vector<double>& BucketBounds(const std::string& name) {
  return FindMetric(absl::StrCat("adaattn_", name)).buckets;
}

const std::vector<double>& LatencyBucketBounds() { return BucketBounds("batch_duration_seconds"); }

double HistogramQuantile(const std::vector<double>& bounds, const std::vector<double>& counts,
                         double share) {
  double total = 0;
  for (const double count : counts) total += count;
  if (total <= 0) return 0;
  double below = 0;
  for (size_t i = 0; i < bounds.size(); ++i) {
    if (below + counts[i] >= share * total && counts[i] > 0) {
      const double low = i == 0 ? 0 : bounds[i - 1];
      return low + (bounds[i] - low) * (share * total - below) / counts[i];
    }
    below += counts[i];
  }
  return bounds.back();
}

}  // namespace adaattn

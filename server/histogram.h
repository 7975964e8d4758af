#ifndef ADAATTN_SERVER_HISTOGRAM_H_
#define ADAATTN_SERVER_HISTOGRAM_H_

#include <string>
#include <vector>

namespace adaattn {

// The upper bounds of the buckets of "adaattn_<name>", a histogram of the table, without +Inf.
const std::vector<double>& BucketBounds(const std::string& name);
// Those of the latency histograms, seconds.
const std::vector<double>& LatencyBucketBounds();

// The value below which `share` of the observations of a histogram lie, by linear interpolation in
// its bucket; the last bound where it is in +Inf; 0 without observations. `counts` holds one cell
// per bound and one for +Inf.
double HistogramQuantile(const std::vector<double>& bounds, const std::vector<double>& counts,
                         double share);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_HISTOGRAM_H_

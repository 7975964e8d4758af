#ifndef ADAATTN_SERVER_METRIC_REGISTRY_H_
#define ADAATTN_SERVER_METRIC_REGISTRY_H_

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "server/metric_table.h"

namespace adaattn {

// The registry made from MetricTable(): every series exists from the start, and its handle is
// looked up once. A metric's handles stand in the order of its label values, the last label
// fastest.
class MetricRegistry {
 public:
  // `open_labels`: by metric name, the values of the labels that the table leaves open.
  explicit MetricRegistry(const std::map<std::string, std::vector<std::string>>& open_labels);

  // Handles of the metric "adaattn_<name>"; it is in the table, with that type.
  const std::vector<prometheus::Counter*>& counters(const char* name) const;
  const std::vector<prometheus::Gauge*>& gauges(const char* name) const;
  const std::vector<prometheus::Histogram*>& histograms(const char* name) const;

  std::vector<prometheus::MetricFamily> Collect() const { return registry_.Collect(); }

 private:
  void Register(const MetricDescriptor& metric, const std::vector<std::string>& open_labels);

  prometheus::Registry registry_;
  std::map<std::string, std::vector<prometheus::Counter*>> counters_;
  std::map<std::string, std::vector<prometheus::Gauge*>> gauges_;
  std::map<std::string, std::vector<prometheus::Histogram*>> histograms_;
};

// The entry of `name`, prefix included, which is in the table.
const MetricDescriptor& FindMetric(const std::string& name);

// A histogram's observations of one batch: plain sums, handed over in one call. One thread.
class BatchHistogram {
 public:
  BatchHistogram(const MetricRegistry& registry, const char* name, size_t cell = 0);

  // Values that are not finite are dropped.
  void Observe(double value);
  void AddTo(std::vector<double>* counts) const;  // per bucket, +Inf last
  void Flush();

 private:
  prometheus::Histogram* target_;
  const std::vector<double>& bounds_;
  std::vector<double> counts_;
  double sum_ = 0;
  bool used_ = false;
};

// Likewise the cells of a counter.
class BatchCounters {
 public:
  BatchCounters(const MetricRegistry& registry, const char* name)
      : targets_(registry.counters(name)), sums_(targets_.size()) {}

  void Add(size_t cell, int64_t count) { sums_[cell] += count; }
  void Flush();

 private:
  std::vector<prometheus::Counter*> targets_;
  std::vector<int64_t> sums_;
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_METRIC_REGISTRY_H_

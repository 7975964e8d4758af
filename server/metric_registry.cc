#include "server/metric_registry.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"

namespace adaattn {
namespace {

std::vector<prometheus::Labels> LabelSets(const MetricDescriptor& metric,
                                          const std::vector<std::string>& open_labels) {
  std::vector<prometheus::Labels> sets(1);
  size_t next_open = 0;
  for (const MetricLabel& label : metric.labels) {
    std::vector<std::string> values = label.values;
    if (values.empty()) values.push_back(open_labels[next_open++]);
    std::vector<prometheus::Labels> longer;
    for (const prometheus::Labels& set : sets) {
      for (const std::string& value : values) {
        longer.push_back(set);
        longer.back()[label.name] = value;
      }
    }
    sets = std::move(longer);
  }
  return sets;
}

}  // namespace

const MetricDescriptor& FindMetric(const std::string& name) {
  const std::vector<MetricDescriptor>& table = MetricTable();
  const auto found = std::find_if(table.begin(), table.end(),
                                  [&name](const MetricDescriptor& m) { return m.name == name; });
  assert(found != table.end());
  return *found;
}

MetricRegistry::MetricRegistry(const std::map<std::string, std::vector<std::string>>& open_labels) {
  for (const MetricDescriptor& metric : MetricTable()) {
    const auto open = open_labels.find(metric.name);
    Register(metric, open == open_labels.end() ? std::vector<std::string>() : open->second);
  }
}

void MetricRegistry::Register(const MetricDescriptor& metric,
                              const std::vector<std::string>& open_labels) {
  const std::vector<prometheus::Labels> sets = LabelSets(metric, open_labels);
  if (metric.type == MetricType::kCounter) {
    auto& family =
        prometheus::BuildCounter().Name(metric.name).Help(metric.help).Register(registry_);
    for (const auto& set : sets) counters_[metric.name].push_back(&family.Add(set));
  } else if (metric.type == MetricType::kGauge) {
    auto& family = prometheus::BuildGauge().Name(metric.name).Help(metric.help).Register(registry_);
    for (const auto& set : sets) gauges_[metric.name].push_back(&family.Add(set));
  } else {
    auto& family =
        prometheus::BuildHistogram().Name(metric.name).Help(metric.help).Register(registry_);
    for (const auto& set : sets) {
      histograms_[metric.name].push_back(&family.Add(set, metric.buckets));
    }
  }
}

const std::vector<prometheus::Counter*>& MetricRegistry::counters(const char* name) const {
  return counters_.at(absl::StrCat("adaattn_", name));
}
const std::vector<prometheus::Gauge*>& MetricRegistry::gauges(const char* name) const {
  return gauges_.at(absl::StrCat("adaattn_", name));
}
const std::vector<prometheus::Histogram*>& MetricRegistry::histograms(const char* name) const {
  return histograms_.at(absl::StrCat("adaattn_", name));
}

BatchHistogram::BatchHistogram(const MetricRegistry& registry, const char* name, size_t cell)
    : target_(registry.histograms(name)[cell]),
      bounds_(FindMetric(absl::StrCat("adaattn_", name)).buckets),
      counts_(bounds_.size() + 1) {}

void BatchHistogram::Observe(double value) {
  if (!std::isfinite(value)) return;
  const auto bound = std::lower_bound(bounds_.begin(), bounds_.end(), value);
  counts_[static_cast<size_t>(bound - bounds_.begin())] += 1;
  sum_ += value;
  used_ = true;
}

void BatchHistogram::AddTo(std::vector<double>* counts) const {
  counts->resize(counts_.size());
  for (size_t i = 0; i < counts_.size(); ++i) (*counts)[i] += counts_[i];
}

void BatchHistogram::Flush() {
  if (!used_) return;
  target_->ObserveMultiple(counts_, sum_);
  std::fill(counts_.begin(), counts_.end(), 0.0);
  sum_ = 0;
  used_ = false;
}

void BatchCounters::Flush() {
  for (size_t i = 0; i < sums_.size(); ++i) {
    if (sums_[i] != 0) targets_[i]->Increment(static_cast<double>(sums_[i]));
    sums_[i] = 0;
  }
}

}  // namespace adaattn

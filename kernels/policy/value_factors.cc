#include "kernels/policy/value_factors.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/format/hadamard.h"
#include "kernels/format/nested_code.h"
#include "kernels/policy/error_model.h"

namespace adaattn {
namespace {

using Rows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Vector = Eigen::VectorXf;

constexpr int64_t kMostQueries = 128;
constexpr int32_t kTriedBits = 2;  // of values: the depth that errs most
constexpr float kMostFactor = 4.0f;

// All q heads of rows drawn evenly: at most kMostQueries, but at least one row.
Rows PickQueries(const ValueSample& sample) {
  const int64_t row_size = int64_t{sample.group_size} * sample.head_dim;
  const int64_t all = static_cast<int64_t>(sample.queries.size()) / row_size;
  const int64_t count = std::min(all, std::max<int64_t>(kMostQueries / sample.group_size, 1));
  Rows queries(count * sample.group_size, sample.head_dim);
  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(sample.queries.data() + i * all / count * row_size, row_size,
                queries.data() + i * row_size);
  }
  return queries;
}

// Each query's distribution over one page's tokens. [queries, 64]
Rows Distributions(const ValueSample& sample, const Rows& queries, int64_t page) {
  const int64_t d = sample.head_dim;
  const Eigen::Map<const Rows> keys(sample.keys.data() + page * kPageTokens * d, kPageTokens, d);
  Rows scores = sample.softmax_scale * (queries * keys.transpose());
  if (sample.softcap > 0) {
    scores = sample.softcap * (scores.array() / sample.softcap).tanh().matrix();
  }
  const Vector largest = scores.rowwise().maxCoeff();
  scores = (scores.colwise() - largest).array().exp().matrix();
  const Vector sums = scores.rowwise().sum();
  return (scores.array().colwise() / sums.array()).matrix();
}

// One page's values in the Hadamard frame: from their mean, what rounding them adds, and the mean
// square of their ranges.
struct TriedValues {
  Rows from_mean, rounding;
  float range2 = 0;
};
TriedValues TryValues(const ValueSample& sample, int64_t page) {
  const int64_t d = sample.head_dim;
  const int32_t groups = ValueGroups(sample.head_dim), width = sample.head_dim / groups;
  TriedValues tried;
  Rows values =
      Eigen::Map<const Rows>(sample.values.data() + page * kPageTokens * d, kPageTokens, d);
  tried.rounding.resize(kPageTokens, d);
  for (int32_t t = 0; t < kPageTokens; ++t) {
    float* const token = values.row(t).data();
    RotateHadamard(token, sample.head_dim);
    for (int32_t begin = 0; begin < sample.head_dim; begin += width) {
      float max_abs = 0;
      for (int32_t c = begin; c < begin + width; ++c) {
        max_abs = std::max(max_abs, std::abs(token[c]));
      }
      const float range = RangeFromScale(ScaleFromMax(max_abs));
      tried.range2 += range * range / static_cast<float>(kPageTokens * groups);
      for (int32_t c = begin; c < begin + width; ++c) {
        const uint32_t prefix = EncodeNested(token[c], range) >> (8 - kTriedBits);
        tried.rounding(t, c) = DecodeNested(prefix, kTriedBits, range) - token[c];
      }
    }
  }
  tried.from_mean = values.rowwise() - values.colwise().mean();
  return tried;
}

// Of every query, actual over predicted: their mean, as a root.
float Factor(const Vector& actual, const Vector& predicted) {
  double sum = 0, count = 0;
  for (Eigen::Index i = 0; i < actual.size(); ++i) {
    const double ratio = double{actual(i)} / predicted(i);
    if (!(predicted(i) > 0) || !std::isfinite(ratio)) continue;
    sum += ratio;
    count += 1;
  }
  const auto root = static_cast<float>(count > 0 ? std::sqrt(sum / count) : 1.0);
  return std::clamp(root, 1 / kMostFactor, kMostFactor);
}

}  // namespace

ValueFactors MeasureValueFactors(const ValueSample& sample) {
  const int64_t d = sample.head_dim;
  const int64_t num_pages = static_cast<int64_t>(sample.keys.size()) / (kPageTokens * d);
  if (sample.queries.empty() || num_pages < 2) return ValueFactors();
  const Rows queries = PickQueries(sample);
  Rows lost = Rows::Zero(queries.rows(), d), rounded = lost;
  Vector square = Vector::Zero(queries.rows()), amplitude = square, rounding = square;
  for (int64_t page = 1; page < num_pages; ++page) {
    const Rows shares = Distributions(sample, queries, page);
    const TriedValues tried = TryValues(sample, page);
    lost += shares * tried.from_mean;
    rounded += shares * tried.rounding;
    const Vector concentration = shares.rowwise().squaredNorm();
    const float spread2 = tried.from_mean.squaredNorm() / kPageTokens;
    square += spread2 * concentration;
    amplitude += (spread2 * concentration).cwiseSqrt();
    rounding +=
        CodeVariance(1.0f, kTriedBits) * static_cast<float>(d) * tried.range2 * concentration;
  }
  ValueFactors factors;
  factors.spread =
      Factor(lost.rowwise().squaredNorm(), square + kCoherence * amplitude.cwiseAbs2());
  factors.rounding = std::max(Factor(rounded.rowwise().squaredNorm(), rounding), 1.0f);
  return factors;
}

}  // namespace adaattn

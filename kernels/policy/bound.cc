#include "kernels/policy/bound.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/format/nested_code.h"
#include "kernels/format/page_layout.h"

namespace adaattn {
double OutputErrorBound(absl::Span<const BoundTerm> terms) {
  std::vector<PreparedTerm> prepared;
  prepared.reserve(terms.size());
  BoundSums sums;
  for (const BoundTerm& term : terms) {
    if (term.mass == 0) continue;
    AddBoundTerm(prepared.emplace_back(PrepareTerm(term)), &sums);
  }
  return LeastBound(sums, [&](double multiplier, double bound) {
    double sum = 0;
    for (const PreparedTerm& term : prepared) sum += ExcessOfTerm(term, multiplier, bound);
    return sum;
  });
}

LseBound BoundLse(absl::Span<const BoundTerm> terms) {
  double up = 0, down = 0;
  for (const BoundTerm& term : terms) {
    if (term.mass == 0) continue;
    up += term.mass * std::exp(term.score_error);
    down += term.mass * std::exp(-term.score_error);
  }
  if (up == 0) return LseBound{};
  return LseBound{-std::log(down), std::log(up)};
}

KeyRanges SumKeyRanges(const float* query, const uint8_t* key_scales, int32_t head_dim) {
  KeyRanges ranges;
  for (int32_t c = 0; c < head_dim; ++c) AddKeyRange(query[c], key_scales[c], &ranges);
  return ranges;
}

ValueRanges SumValueRanges(const uint8_t* value_scales, int32_t head_dim) {
  const int32_t groups = ValueGroups(head_dim);
  const double width = static_cast<double>(head_dim) / groups;
  ValueRanges ranges;
  std::vector<double> largest(static_cast<size_t>(groups), 0.0);
  double token = 0;
  for (int32_t t = 0; t < kPageTokens; ++t) {
    double squares = 0;
    for (int32_t group = 0; group < groups; ++group) {
      const uint8_t scale = value_scales[t * groups + group];
      const double range = RangeFromScale(scale);
      squares += width * range * range;
      largest[group] = std::max(largest[group], range);
      ranges.saturated |= scale == kLargestScale;
    }
    token = std::max(token, squares);
  }
  double page = 0;
  for (const double range : largest) page += width * range * range;
  ranges.token = std::sqrt(token);
  ranges.page = std::sqrt(page);
  return ranges;
}

}  // namespace adaattn

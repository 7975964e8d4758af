#include "kernels/policy/bound.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/format/nested_code.h"
#include "kernels/format/page_layout.h"

namespace adaattn {
namespace {

// exp of it is as good as infinity beside any mass, and still a number.
constexpr double kMaxScoreError = 300;
constexpr int kBisections = 30;  // a billionth of the trivial bound
constexpr uint8_t kLargestScale = 255;

// A term with its exponentials.
struct Prepared {
  BoundTerm term;
  double up = 1;    // exp(e)
  double down = 1;  // exp(-e)

  // max over t and h of exp(t) (g + h - bound).
  double Worst(double g, double bound) const {
    const double x = g + term.value_error - bound;
    return x * (x > 0 ? up : down);
  }
};

// Whether no choice of weights, values and directions exceeds `bound`.
bool Holds(const std::vector<Prepared>& terms, double multiplier, double bound) {
  double sum = 0;
  for (const Prepared& p : terms) {
    const double shift = multiplier * p.term.distance;
    sum += p.term.mass * std::max(p.Worst(p.term.distance, bound) - shift,
                                  p.Worst(-p.term.distance, bound) + shift);
  }
  return sum <= 0;
}

}  // namespace

double OutputErrorBound(absl::Span<const BoundTerm> terms) {
  std::vector<Prepared> prepared;
  prepared.reserve(terms.size());
  double trivial = 0, weight = 0, multiplier = 0;
  for (const BoundTerm& term : terms) {
    if (term.mass == 0) continue;
    Prepared& p = prepared.emplace_back();
    p.term = term;
    p.up = std::exp(std::min(term.score_error, kMaxScoreError));
    p.down = 1 / p.up;
    // o* is a mean of the true values, whatever the weights.
    trivial = std::max(trivial, term.distance + term.value_error);
    weight += term.mass * term.distance;
    multiplier += term.mass * term.distance * 2 / (p.up + p.down);
  }
  // The best multiplier of equal terms is 1 / cosh(e).
  multiplier = weight > 0 ? multiplier / weight : 1;
  if (!(trivial < std::numeric_limits<double>::infinity())) return trivial;
  double below = 0, bound = trivial;
  for (int i = 0; i < kBisections; ++i) {
    const double middle = 0.5 * (below + bound);
    (Holds(prepared, multiplier, middle) ? bound : below) = middle;
  }
  return bound;
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

double RelativeBound(double error, double output_norm) {
  if (error == 0) return 0;
  if (!(error < output_norm)) return std::numeric_limits<double>::infinity();
  return error / (output_norm - error);
}

KeyRanges SumKeyRanges(const float* query, const uint8_t* key_scales, int32_t head_dim) {
  KeyRanges ranges;
  double squares = 0;
  for (int32_t c = 0; c < head_dim; ++c) {
    const double range = RangeFromScale(key_scales[c]);
    const double q = std::abs(double{query[c]});
    ranges.weighted += q * range;
    ranges.largest = std::max(ranges.largest, q * range);
    ranges.sum += range;
    squares += range * range;
    ranges.query_sum += q;
    ranges.saturated |= key_scales[c] == kLargestScale;
  }
  ranges.norm = std::sqrt(squares);
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

double CodeError(int32_t bits) {
  // (x / r + 1) * 128 is off by at most 2^-16 cells of 8 bits, the decoded value by 2^-22.
  return std::ldexp(1 + 0x1p-12, -bits);
}

}  // namespace adaattn

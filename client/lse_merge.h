#ifndef ADAATTN_CLIENT_LSE_MERGE_H_
#define ADAATTN_CLIENT_LSE_MERGE_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "absl/types/span.h"

namespace adaattn::client {

// Attention over one part of a sequence's keys, for `rows` (token, q head) pairs.
struct PartialAttention {
  absl::Span<const float> o;    // [rows, head_dim]
  absl::Span<const float> lse;  // [rows], natural log; -inf: the part had no keys, o is ignored
};

// The merge of any number of partial results over disjoint keys is what attention over all of them
// at once gives:
//
//   lse = ln sum_i exp(lse_i);  o = sum_i exp(lse_i - lse) o_i
//
// Stable at any magnitude of the lse_i, because the largest is subtracted first; sums run in
// double. No parts, or only empty ones: o = 0, lse = -inf. A NaN, or an lse of +inf, makes its row
// NaN.
//
//   o    [rows, head_dim], may be the o of one of the parts
//   lse  [rows], likewise
//
// Requires: every span has the stated size, rows = lse.size().
inline void MergePartials(absl::Span<const PartialAttention> parts, absl::Span<float> o,
                          absl::Span<float> lse) {
  constexpr double kEmpty = -std::numeric_limits<double>::infinity();
  const size_t rows = lse.size();
  const size_t head_dim = rows == 0 ? 0 : o.size() / rows;
  std::vector<double> weights(parts.size());
  for (size_t row = 0; row < rows; ++row) {
    double top = kEmpty;
    bool defined = true;
    for (const PartialAttention& part : parts) {
      const double part_lse = part.lse[row];
      defined = defined && part_lse < std::numeric_limits<double>::infinity();  // NaN: false
      if (part_lse > top) top = part_lse;
    }
    double sum = 0;
    for (size_t p = 0; p < parts.size(); ++p) {
      const double part_lse = parts[p].lse[row];
      // exp(-inf - -inf) is NaN, and an empty part weighs nothing even where all are empty.
      weights[p] = part_lse == kEmpty ? 0 : std::exp(part_lse - top);
      sum += weights[p];
    }
    const double undefined = std::numeric_limits<double>::quiet_NaN();
    for (size_t d = 0; d < head_dim; ++d) {
      double value = 0;
      for (size_t p = 0; p < parts.size(); ++p) {
        if (weights[p] != 0) value += weights[p] * parts[p].o[row * head_dim + d];
      }
      o[row * head_dim + d] = static_cast<float>(!defined  ? undefined
                                                 : sum > 0 ? value / sum
                                                           : 0.0);
    }
    lse[row] = static_cast<float>(!defined ? undefined : sum > 0 ? top + std::log(sum) : kEmpty);
  }
}

}  // namespace adaattn::client

#endif  // ADAATTN_CLIENT_LSE_MERGE_H_

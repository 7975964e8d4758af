#ifndef ADAATTN_KERNELS_POLICY_VALUE_FACTORS_H_
#define ADAATTN_KERNELS_POLICY_VALUE_FACTORS_H_

// How far one kv head's values err, measured against what the error model says of them. Host code.
//
// The model takes it that a query looks at a page's tokens regardless of their values, and that
// what is lost in different pages shares kCoherence of its direction. Heads differ from that by up
// to five in the square, and a head keeps its way over a text: one that looks for certain tokens
// finds the same values in every page, so that their distances from the pages' means, and their
// rounding, add up; one that looks evenly loses less than is said. So it is tried once per basis,
// on the pages and queries that the basis is fitted on, and what comes out goes into every
// ValueSummary that is sealed with it: no step pays for it.

#include <cstdint>

#include "absl/types/span.h"
#include "kernels/format/page_layout.h"

namespace adaattn {

struct ValueSample {
  int32_t head_dim = 0;
  int32_t group_size = 0;
  float softmax_scale = 0;
  float softcap = 0;                // 0 = none
  absl::Span<const float> keys;     // [tokens, head_dim], whole pages
  absl::Span<const float> values;   // likewise
  absl::Span<const float> queries;  // [rows, group_size, head_dim]: the kv head's q heads
};

// What comes of the values if each page but the first (which may hold the sink) is replaced by its
// mean, and if they are read at 2 bits, with equal shares for all pages and each query's own
// distribution within them: the mean of actual over predicted square, over at most 128 queries (of
// rows drawn evenly, or one row if that is more). Of both, roots within [1/4, 4]. Rounding is only
// ever raised: where the mass lies on tokens of small values, its figure falls below 1, but not for
// the pages that follow.
//
// Without queries or a second page, or where nothing is lost: 1.
ValueFactors MeasureValueFactors(const ValueSample& sample);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_VALUE_FACTORS_H_

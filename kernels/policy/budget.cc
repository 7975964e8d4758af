#include "kernels/policy/budget.h"

#include <algorithm>

namespace adaattn {

BudgetChoice ChooseTheta(const DecisionParams& params, absl::Span<const PageBudget> pages,
                         int32_t head_dim, int32_t stored_bits) {
  ErrorTerms sums[kNumBudgetThetas];
  ErrorTerms full_depth;
  for (const PageBudget& page : pages) {
    const int32_t below = NumThetasBelow(page.share);
    int32_t begin = 0;
    for (const int32_t edge : {below - 12, below - 8, below - 4, below, kNumBudgetThetas}) {
      const int32_t end = std::min(std::max(edge, begin), kNumBudgetThetas);
      if (end == begin) continue;
      const ErrorTerms terms =
          BudgetTermsAt(params, page, BudgetTheta(begin), head_dim, stored_bits);
      for (; begin < end; ++begin) AddTerms(terms, &sums[begin]);
    }
    AddTerms(BudgetTermsAt(params, page, 0.0f, head_dim, stored_bits), &full_depth);
  }
  return ChooseThetaFromTerms(sums, full_depth, params.target_relative_error);
}

}  // namespace adaattn

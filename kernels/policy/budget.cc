#include "kernels/policy/budget.h"

namespace adaattn {

BudgetChoice ChooseTheta(const DecisionParams& params, absl::Span<const PageBudget> pages,
                         int32_t head_dim, int32_t stored_bits) {
  ErrorTerms sums[kNumBudgetThetas];
  ErrorTerms full_depth;
  for (const PageBudget& page : pages) {
    for (int32_t i = 0; i < kNumBudgetThetas; ++i) {
      AddTerms(BudgetTermsAt(params, page, BudgetTheta(i), head_dim, stored_bits), &sums[i]);
    }
    AddTerms(BudgetTermsAt(params, page, 0.0f, head_dim, stored_bits), &full_depth);
  }
  return ChooseThetaFromTerms(sums, full_depth, params.target_relative_error);
}

}  // namespace adaattn

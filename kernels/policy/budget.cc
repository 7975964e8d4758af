#include "kernels/policy/budget.h"

namespace adaattn {

BudgetChoice ChooseTheta(const DecisionParams& params, absl::Span<const PageBudget> pages,
                         int32_t head_dim, int32_t stored_bits) {
  ErrorTerms sums[kNumBudgetThetas];
  ErrorTerms full_depth;
  for (const PageBudget& page : pages) {
    ErrorTerms terms[kNumRungs];
    for (int32_t rung = 0; rung < kNumRungs; ++rung) {
      terms[rung] =
          TermsOf(page.parts, RungFactors(params, rung, page.facts, head_dim, stored_bits));
    }
    const int32_t below = NumThetasBelow(page.share);
    for (int32_t i = 0; i < kNumBudgetThetas; ++i) {
      AddTerms(terms[BudgetRung(below, i)], &sums[i]);
    }
    AddTerms(BudgetTermsAt(params, page, 0.0f, head_dim, stored_bits), &full_depth);
  }
  return ChooseThetaFromTerms(sums, full_depth, params.target_relative_error);
}

}  // namespace adaattn

#include "kernels/policy/budget.h"

namespace adaattn {

BudgetChoice ChooseTheta(const DecisionParams& params, absl::Span<const PageBudget> pages,
                         int32_t head_dim, int32_t stored_bits) {
  float sums[kNumBudgetThetas] = {};
  float full_depth_sum = 0.0f;
  for (const PageBudget& page : pages) {
    for (int32_t i = 0; i < kNumBudgetThetas; ++i) {
      sums[i] += BudgetErrorAt(params, page, BudgetTheta(i), head_dim, stored_bits);
    }
    full_depth_sum += BudgetErrorAt(params, page, 0.0f, head_dim, stored_bits);
  }
  return ChooseThetaFromSums(sums, full_depth_sum, params.target_relative_error);
}

}  // namespace adaattn

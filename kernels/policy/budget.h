#ifndef ADAATTN_KERNELS_POLICY_BUDGET_H_
#define ADAATTN_KERNELS_POLICY_BUDGET_H_

// The budget policy: the largest theta whose predicted error stays under the caller's target.
//
// The scan gives each page's share; the error model gives what each depth of it would cost. Both
// are per row and q head; a kv head's error is their root mean square, relative to |o|. Theta comes
// from a grid of half octaves, and the prediction is aimed at kBudgetMargin of the target: the
// actual error of a head spreads about its prediction (log-normally, sigma .3 to .5), so aiming at
// the target itself would exceed it in half of the steps.
//
// On the device: AddToBudget per page and column, BudgetTermsAt summed over pages by member for
// every theta of the grid and for 0, ChooseThetaFromTerms at the end.

#include <cmath>
#include <cstdint>

#include "absl/types/span.h"
#include "kernels/host_device.h"
#include "kernels/policy/decision.h"
#include "kernels/policy/error_model.h"
#include "kernels/policy/ladder.h"

namespace adaattn {

inline constexpr int32_t kNumBudgetThetas = 29;  // 2^-16, 2^-15.5, ..., 2^-2
inline constexpr float kBudgetMargin = 0.7f;

// Grid value `index` in [0, kNumBudgetThetas), ascending.
ADAATTN_HD constexpr float BudgetTheta(int32_t index) {
  float theta = index % 2 == 0 ? 1.0f : 1.41421356f;
  for (int32_t octave = index / 2; octave < 16; ++octave) theta *= 0.5f;
  return theta;
}

// What a budget needs of one sealed page of one kv head: its share (as the ladder takes it) and its
// part of the kv head's mean square relative error.
struct PageBudget {
  float share = 0;
  PageFacts facts;
  float square[kNumValueDepths] = {};  // ErrorTerms::square by value bits / 2
  float amplitude_square = 0;          // of ErrorTerms::amplitude, where the page is skipped
};

// Adds one row and q head to `page`, whose facts are set already: raises its share, adds the error
// of each depth. The keys are taken at the depth that LadderDepth pairs with these value bits;
// `inputs.score_variance` is that of the 4-bit scan.
//
//   weight  1 / (|o|^2 * number of rows * number of q heads); 0 where o is 0
ADAATTN_HD void AddToBudget(const DecisionParams& params, const PageErrorInputs& inputs,
                            float weight, int32_t head_dim, int32_t stored_bits, PageBudget* page) {
  page->share = inputs.share > page->share ? inputs.share : page->share;
  for (int32_t depth = 0; depth < kNumValueDepths; ++depth) {
    const int32_t value_bits = 2 * depth < stored_bits ? 2 * depth : stored_bits;
    int32_t key_bits = page->facts.sink ? stored_bits : LadderKeyBits(value_bits);
    if (value_bits > 0 && key_bits < params.floor_key_bits) key_bits = params.floor_key_bits;
    if (key_bits > stored_bits) key_bits = stored_bits;
    PageErrorInputs at_depth = inputs;
    at_depth.score_variance = ScoreVarianceAt(inputs.score_variance, key_bits);
    const ErrorTerms terms = PageErrorTerms(at_depth, value_bits, head_dim);
    page->square[depth] += weight * terms.square;
    page->amplitude_square += weight * terms.amplitude * terms.amplitude;
  }
}

// The page's part of the mean square relative error when the ladder runs with `theta`.
ADAATTN_HD ErrorTerms BudgetTermsAt(const DecisionParams& params, const PageBudget& page,
                                    float theta, int32_t head_dim, int32_t stored_bits) {
  const PageDepth depth = LadderDepth(params, theta, page.share, page.facts, head_dim, stored_bits);
  ErrorTerms terms;
  terms.square = page.square[depth.value_bits / 2];
  if (depth.value_bits == 0) terms.amplitude = sqrtf(page.amplitude_square);
  return terms;
}

struct BudgetChoice {
  float theta = 0;            // 0: no theta of the grid fits, every page at full depth
  float predicted_error = 0;  // relative, root mean square, of the depths that theta gives
  bool fallback = false;      // theta is 0 for that reason; the target may still be missed
};

// Chooses theta for one kv head from all of its visible sealed pages.
BudgetChoice ChooseTheta(const DecisionParams& params, absl::Span<const PageBudget> pages,
                         int32_t head_dim, int32_t stored_bits);

// The choice from sums[i], BudgetTermsAt(BudgetTheta(i)) summed over the pages, and the sum at
// theta 0; the part of ChooseTheta that a device reduction ends with.
ADAATTN_HD BudgetChoice ChooseThetaFromTerms(const ErrorTerms* sums, const ErrorTerms& full_depth,
                                             float target_relative_error) {
  const float limit = kBudgetMargin * target_relative_error;
  BudgetChoice choice;
  for (int32_t i = kNumBudgetThetas - 1; i >= 0; --i) {
    const float square = ErrorSquare(sums[i]);
    if (square <= limit * limit) {
      choice.theta = BudgetTheta(i);
      choice.predicted_error = sqrtf(square);
      return choice;
    }
  }
  choice.predicted_error = sqrtf(ErrorSquare(full_depth));
  choice.fallback = true;
  return choice;
}

// What the CUDA kernel sums until it carries ErrorTerms: one number per page that is never below
// its independent part. As amplitude^2 = concentration * spread^2 * share^2 and a concentration is
// at least 1 / 64, the factor stands for kCoherence times the number of pages that are skipped
// together.
ADAATTN_HD float BudgetErrorAt(const DecisionParams& params, const PageBudget& page, float theta,
                               int32_t head_dim, int32_t stored_bits) {
  const ErrorTerms terms = BudgetTermsAt(params, page, theta, head_dim, stored_bits);
  return terms.square + 64.0f * kCoherence * terms.amplitude * terms.amplitude;
}
ADAATTN_HD BudgetChoice ChooseThetaFromSums(const float* sums, float full_depth_sum,
                                            float target_relative_error) {
  ErrorTerms terms[kNumBudgetThetas];
  for (int32_t i = 0; i < kNumBudgetThetas; ++i) terms[i].square = sums[i];
  ErrorTerms full_depth;
  full_depth.square = full_depth_sum;
  return ChooseThetaFromTerms(terms, full_depth, target_relative_error);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_BUDGET_H_

#ifndef ADAATTN_KERNELS_POLICY_BUDGET_H_
#define ADAATTN_KERNELS_POLICY_BUDGET_H_

// The budget policy: the largest theta whose predicted error stays under the caller's target.
//
// The scan gives each page's share; the error model gives what each depth of it would cost. Both
// are per row and q head; a kv head's error is their root mean square, relative to |o|. Theta comes
// from a grid of half octaves, and the prediction is aimed below the target (BudgetLimit2): the
// actual error of a head spreads about its prediction (log-normally, sigma .3 to .5), so aiming at
// the target itself would exceed it in half of the steps.
//
// On the device: AddToBudget per page and column; RungFactors, of which a page has five whatever
// the theta; BudgetRung for which of them a theta of the grid asks; sums over pages by member.

#include <cmath>
#include <cstdint>

#include "absl/types/span.h"
#include "kernels/format/float_types.h"
#include "kernels/host_device.h"
#include "kernels/policy/decision.h"
#include "kernels/policy/error_model.h"
#include "kernels/policy/ladder.h"

namespace adaattn {

inline constexpr int32_t kNumBudgetThetas = 29;  // 2^-16, 2^-15.5, ..., 2^-2
inline constexpr float kBudgetMargin = 0.7f;

// Relative error that no depth takes away from some q heads: even at full depth 2 to 5 % of them
// err by more than .02 (tests/data and a 32k trace), twice to four times the mean that is predicted
// for their kv head. It matters for small targets only; this much of it leaves at most 8 % of q
// heads above .02.
inline constexpr float kBudgetFloor = 0.0085f;

// The mean square relative error to aim at; negative where the floor alone exceeds the target.
ADAATTN_HD constexpr float BudgetLimit2(float target_relative_error) {
  const float aim = kBudgetMargin * target_relative_error;
  return aim * aim - kBudgetFloor * kBudgetFloor;
}

// Grid value `index` in [0, kNumBudgetThetas), ascending.
ADAATTN_HD constexpr float BudgetTheta(int32_t index) {
  return (index % 2 == 0 ? 1.0f : 1.41421356f) / static_cast<float>(1 << (16 - index / 2));
}

// What a budget needs of one sealed page of one kv head: its share (as the ladder takes it) and its
// part of the kv head's mean square relative error, with keys as the 4-bit scan reads them.
struct PageBudget {
  float share = 0;
  PageFacts facts;
  PageErrorParts parts;
};

// Adds one row and q head to `page`, whose facts are set already.
//
//   share   of the row's mass
//   parts   ErrorParts of the page, score_variance that of the 4-bit scan
//   weight  1 / (|o|^2 * number of rows * number of q heads); 0 where o is 0
ADAATTN_HD constexpr void AddToBudget(float share, const PageErrorParts& parts, float weight,
                                      PageBudget* page) {
  page->share = share > page->share ? share : page->share;
  page->parts.skipped += weight * parts.skipped;
  page->parts.score += weight * parts.score;
  page->parts.value += weight * parts.value;
}

// The page's part of the mean square relative error when the ladder runs with `theta`.
ADAATTN_HD ErrorTerms BudgetTermsAt(const DecisionParams& params, const PageBudget& page,
                                    float theta, int32_t head_dim, int32_t stored_bits) {
  const PageDepth depth = LadderDepth(params, theta, page.share, page.facts, head_dim, stored_bits);
  return TermsOf(page.parts, ScoreVarianceAt(1.0f, depth.key.bits), depth.value_bits);
}

// What a page's terms are made of on rung `rung` of the ladder.
ADAATTN_HD constexpr TermFactors RungFactors(const DecisionParams& params, int32_t rung,
                                             const PageFacts& facts, int32_t head_dim,
                                             int32_t stored_bits) {
  const PageDepth depth = RungDepth(params, rung, facts, head_dim, stored_bits);
  return FactorsOf(ScoreVarianceAt(1.0f, depth.key.bits), depth.value_bits);
}

// How many values of the grid lie below `share`. As 4 theta is the grid's value four further on, a
// page's rung changes only at this index and 4, 8 and 12 before it.
ADAATTN_HD int32_t NumThetasBelow(float share) {
  if (!(share > BudgetTheta(0))) return 0;
  // share = (1 + mantissa / 2^23) 2^octave, and so are the thetas, whose mantissa is 0 or this.
  constexpr uint32_t kHalfOctave = 0x3504f3;
  const uint32_t bits = FloatBits(share), mantissa = bits & 0x7fffffu;
  const int32_t octave = static_cast<int32_t>(bits >> 23) - 127;
  const int32_t below =
      2 * (octave + 16) + (mantissa > 0 ? 1 : 0) + (mantissa > kHalfOctave ? 1 : 0);
  return below < kNumBudgetThetas + 12 ? below : kNumBudgetThetas + 12;
}

// The rung that value `index` of the grid puts a page on whose share has `below` values below it.
ADAATTN_HD constexpr int32_t BudgetRung(int32_t below, int32_t index) {
  const int32_t above = below - index + 3;
  return static_cast<int32_t>(static_cast<uint32_t>(above < 0 ? 0 : above < 16 ? above : 16) / 4);
}

// Whether the mean square relative error of `terms` is low enough for the target.
ADAATTN_HD constexpr bool FitsBudget(const ErrorTerms& terms, float target_relative_error) {
  return ErrorSquare(terms) <= BudgetLimit2(target_relative_error);
}

// The largest of thetas [0, begin] of the grid whose predicted error, sum_of(theta) over all pages,
// fits; 0: none. Error need not fall with theta everywhere (2 bits of a value may miss it by more
// than the mean), so they are gone through one by one.
template <class SumOf>
float LargestTheta(int32_t begin, float target_relative_error, const SumOf& sum_of) {
  for (int32_t i = begin; i >= 0; --i) {
    if (FitsBudget(sum_of(BudgetTheta(i)), target_relative_error)) return BudgetTheta(i);
  }
  return 0;
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
  BudgetChoice choice;
  for (int32_t i = kNumBudgetThetas - 1; i >= 0; --i) {
    if (!FitsBudget(sums[i], target_relative_error)) continue;
    choice.theta = BudgetTheta(i);
    choice.predicted_error = sqrtf(ErrorSquare(sums[i]));
    return choice;
  }
  choice.predicted_error = sqrtf(ErrorSquare(full_depth));
  choice.fallback = true;
  return choice;
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_BUDGET_H_

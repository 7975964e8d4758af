#ifndef ADAATTN_KERNELS_POLICY_FEEDBACK_H_
#define ADAATTN_KERNELS_POLICY_FEEDBACK_H_

// The feedback policy: theta of a kv head from step to step, so that predicted errors stay under
// the caller's target, at no cost to a step. A budget works theta out anew in every step, which on
// a GPU is a launch of its own; but most of what it finds is the head's own, and the prediction for
// a theta that was used comes with the answer. So the first step of a layer chooses as a budget
// does, and each step after it moves theta by how far the one before was off.
//
// It is an integral controller of log theta: to read more it takes four times as long a step as to
// read less, since an error that exceeds its target is worse than bytes read in vain. Where these
// numbers come from: docs/policies.md.

#include <cmath>

#include "kernels/host_device.h"
#include "kernels/policy/budget.h"
#include "kernels/policy/theta.h"

namespace adaattn {

// Of BudgetLimit2: what theta follows is a mean, so errors need more room below their target than
// where each is held under it.
inline constexpr float kFeedbackRoom = 0.66f;
// Octaves of theta per octave that the error is too low, too high; and at most so many a step.
inline constexpr float kFeedbackUp = 0.1f;
inline constexpr float kFeedbackDown = 0.4f;
inline constexpr float kFeedbackMostUp = 1.0f;
inline constexpr float kFeedbackMostDown = 3.0f;

// The mean square relative error that theta follows; not positive where data err too much by
// themselves to aim at the target: a budget must choose then.
ADAATTN_HD constexpr float FeedbackAim2(float target_relative_error) {
  return kFeedbackRoom * BudgetLimit2(target_relative_error);
}

// Theta after a step with `theta` whose error was predicted as `predicted_error` (HeadDecision).
// Requires: FeedbackAim2(target_relative_error) > 0.
ADAATTN_HD float NextTheta(float theta, float predicted_error, float target_relative_error) {
  const float error2 = predicted_error * predicted_error;
  const float aim2 = FeedbackAim2(target_relative_error);
  const float below = error2 == 0 ? kFeedbackMostUp / kFeedbackUp : 0.5f * log2f(aim2 / error2);
  const float octaves = below > 0 ? fminf(kFeedbackUp * below, kFeedbackMostUp)
                                  : fmaxf(kFeedbackDown * below, -kFeedbackMostDown);
  return ClampTheta(theta * exp2f(octaves));
}

// Theta that does for target `to` what `theta` does for target `from`: errors grow about as it
// does. Requires: FeedbackAim2 of both > 0.
ADAATTN_HD float ThetaForTarget(float theta, float from, float to) {
  return ClampTheta(theta * sqrtf(FeedbackAim2(to) / FeedbackAim2(from)));
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_FEEDBACK_H_

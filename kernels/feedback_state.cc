#include "kernels/feedback_state.h"

#include <algorithm>

#include "kernels/policy/feedback.h"

namespace adaattn {

void UseFeedback(const FeedbackState& state, float* thetas, SequenceStep* step) {
  const float target = step->decision.target_relative_error;
  if (state.thetas.empty() || FeedbackAim2(target) <= 0 || step->decision.bounded) {
    step->decision.policy = Policy::kBudget;
    return;
  }
  std::transform(state.thetas.begin(), state.thetas.end(), thetas,
                 [&](float theta) { return ThetaForTarget(theta, state.target, target); });
  step->decision.policy = Policy::kThreshold;
  step->thetas = {thetas, state.thetas.size()};
}

void FollowFeedback(absl::Span<const HeadDecision> heads, float target, FeedbackState* state) {
  state->thetas.clear();
  const bool chosen = std::all_of(heads.begin(), heads.end(),
                                  [](const HeadDecision& head) { return head.theta > 0; });
  if (!chosen || FeedbackAim2(target) <= 0) return;
  state->target = target;
  for (const HeadDecision& head : heads) {
    state->thetas.push_back(NextTheta(head.theta, head.predicted_error, target));
  }
}

}  // namespace adaattn

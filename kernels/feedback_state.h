#ifndef ADAATTN_KERNELS_FEEDBACK_STATE_H_
#define ADAATTN_KERNELS_FEEDBACK_STATE_H_

// The feedback policy (policy/feedback.h) over the steps of one layer, as a backend sees them.

#include <vector>

#include "absl/types/span.h"
#include "kernels/attention.h"

namespace adaattn {

// What one step of a layer leaves for the next.
struct FeedbackState {
  std::vector<float> thetas;  // [num_kv_heads]; empty: a budget chooses them
  float target = 0;           // that they were made for
};

// Turns `step`, whose policy is kFeedback, into what runs: a threshold with the layer's thetas,
// which go to `thetas` [num_kv_heads] and must stay there while the step is used; or a budget,
// where the layer has none, its target leaves nothing to aim at, or the step is bounded.
void UseFeedback(const FeedbackState& state, float* thetas, SequenceStep* step);

// Takes up what a step aiming at `target` decided, [num_kv_heads]. A head without theta (the budget
// found none, or no sealed page is visible) leaves the next choice to a budget.
void FollowFeedback(absl::Span<const HeadDecision> heads, float target, FeedbackState* state);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_FEEDBACK_STATE_H_

#ifndef ADAATTN_SERVER_DECISION_SUMMARY_H_
#define ADAATTN_SERVER_DECISION_SUMMARY_H_

#include "absl/types/span.h"
#include "kernels/policy/decision.h"
#include "kernels/shape.h"
#include "server/attention_task.h"

namespace adaattn {

// Sums up the decisions of one sequence's kv heads. `options` are those that ran; `raised`:
// pressure has raised the target.
DecisionSummary Summarize(absl::Span<const HeadDecision> heads, const AttentionShape& shape,
                          PageFormat format, const ResolvedOptions& options, bool raised);

// The target under pressure: `target` while the queue is filled up to `threshold`, growing
// geometrically to `max` when it is full. `max` <= `target`: never grows.
float RaiseTarget(float target, float max, double queue_fraction, double threshold);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_DECISION_SUMMARY_H_

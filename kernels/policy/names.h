#ifndef ADAATTN_KERNELS_POLICY_NAMES_H_
#define ADAATTN_KERNELS_POLICY_NAMES_H_

#include <optional>
#include <string>

#include "absl/strings/string_view.h"
#include "kernels/policy/decision.h"

namespace adaattn {

// "full_depth", "static", "threshold", "budget", "entropy", "learned", "feedback": the spelling in
// flags, JSON and metrics.
const char* PolicyName(Policy policy);

// The policy of that name; nothing for any other text.
std::optional<Policy> ParsePolicy(absl::string_view name);

// "threshold theta=0.004 coarse_rank=64 z=2 ...": the fields that matter to the policy, for logs
// and plans.
std::string DebugString(const DecisionParams& params);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_NAMES_H_

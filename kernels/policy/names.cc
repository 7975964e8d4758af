#include "kernels/policy/names.h"

#include "absl/strings/str_cat.h"

namespace adaattn {
namespace {
constexpr Policy kPolicies[] = {Policy::kFullDepth, Policy::kStatic,  Policy::kThreshold,
                                Policy::kBudget,    Policy::kEntropy, Policy::kLearned,
                                Policy::kFeedback};
}  // namespace

const char* PolicyName(Policy policy) {
  switch (policy) {
    case Policy::kFullDepth:
      return "full_depth";
    case Policy::kStatic:
      return "static";
    case Policy::kThreshold:
      return "threshold";
    case Policy::kBudget:
      return "budget";
    case Policy::kEntropy:
      return "entropy";
    case Policy::kLearned:
      return "learned";
    case Policy::kFeedback:
      return "feedback";
  }
  return "unknown";
}

std::optional<Policy> ParsePolicy(absl::string_view name) {
  for (const Policy policy : kPolicies) {
    if (name == PolicyName(policy)) return policy;
  }
  return std::nullopt;
}

std::string DebugString(const DecisionParams& params) {
  std::string text = PolicyName(params.policy);
  if (params.policy == Policy::kStatic) {
    absl::StrAppend(&text, " key_bits=", params.static_key_bits, " rank=", params.static_rank,
                    " value_bits=", params.static_value_bits);
  }
  if (params.policy == Policy::kThreshold) {
    absl::StrAppend(&text, " theta=", params.theta);
    if (params.coarse_rank > 0) {
      absl::StrAppend(&text, " coarse_rank=", params.coarse_rank, " z=", params.coarse_z);
    }
  }
  if (params.policy == Policy::kEntropy) absl::StrAppend(&text, " theta=", params.theta);
  if (AimsAtError(params.policy)) {
    absl::StrAppend(&text, " target_relative_error=", params.target_relative_error);
  }
  if (params.bounded) absl::StrAppend(&text, " bounded");
  if (params.policy != Policy::kFullDepth) {
    absl::StrAppend(&text, " floor_key_bits=", params.floor_key_bits,
                    " floor_value_bits=", params.floor_value_bits);
  }
  return text;
}

}  // namespace adaattn

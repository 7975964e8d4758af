#include "server/policy_options.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/policy/names.h"

namespace adaattn {
namespace {

// One field that is set, and what it needs beside it.
struct SetField {
  const char* name;
  bool set;
};

absl::Status Refuse(absl::string_view field, std::initializer_list<SetField> fields,
                    absl::string_view beside) {
  for (const SetField& each : fields) {
    if (!each.set) continue;
    const std::string name =
        field.empty() ? std::string(each.name) : absl::StrCat(field, ".", each.name);
    return InvalidField(name, "a value", absl::StrCat("unset with ", beside));
  }
  return absl::OkStatus();
}

absl::Status CheckMode(const v1::AttendOptions& options, absl::string_view field) {
  const v1::Mode mode = options.mode();
  if (mode == v1::MODE_UNSPECIFIED) return absl::OkStatus();
  const std::string& name = v1::Mode_Name(mode);
  absl::Status status;
  if (mode != v1::MODE_STATIC) {
    status = Refuse(field,
                    {{"static_key_bits", options.static_key_bits() != 0},
                     {"static_rank", options.static_rank() != 0},
                     {"static_value_bits", options.static_value_bits() != 0}},
                    name);
  }
  if (status.ok() &&
      (mode == v1::MODE_EXACT || mode == v1::MODE_FULL_DEPTH || mode == v1::MODE_STATIC)) {
    status = Refuse(field,
                    {{"policy", options.policy() != v1::POLICY_UNSPECIFIED},
                     {"theta", options.theta() != 0},
                     {"target_relative_error", options.target_relative_error() != 0},
                     {"max_relative_error", options.max_relative_error() != 0}},
                    name);
  }
  return status;
}

absl::Status CheckPolicy(const v1::AttendOptions& options, absl::string_view field) {
  switch (options.policy()) {
    case v1::POLICY_THRESHOLD:
    case v1::POLICY_ENTROPY:
      return Refuse(field,
                    {{"target_relative_error", options.target_relative_error() != 0},
                     {"max_relative_error", options.max_relative_error() != 0}},
                    v1::Policy_Name(options.policy()));
    case v1::POLICY_BUDGET:
    case v1::POLICY_FEEDBACK:
    case v1::POLICY_LEARNED:
      return Refuse(field, {{"theta", options.theta() != 0}}, v1::Policy_Name(options.policy()));
    default:
      return absl::OkStatus();
  }
}

}  // namespace

absl::Status CheckPolicyFields(const v1::AttendOptions& options, absl::string_view field,
                               const BackendInfo& backend) {
  absl::Status status = CheckMode(options, field);
  if (status.ok()) status = CheckPolicy(options, field);
  if (!status.ok() || options.policy() == v1::POLICY_UNSPECIFIED) return status;
  const Policy policy = PolicyOf(options.policy());
  const std::vector<Policy>& policies = backend.policies;
  if (std::find(policies.begin(), policies.end(), policy) != policies.end()) return status;
  return absl::UnimplementedError(absl::StrCat(
      field, field.empty() ? "" : ".", "policy: ", PolicyName(policy), " is not supported by ",
      backend.name,
      "; supported: ", absl::StrJoin(policies, ", ", [](std::string* out, Policy each) {
        out->append(PolicyName(each));
      })));
}

void FillServerDefaults(const ValidationContext& context, const ModelProfile* profile,
                        AttendOptions* defaults) {
  if (context.theta_model != nullptr) defaults->theta_model = *context.theta_model;
  if (profile != nullptr && profile->theta_model) defaults->theta_model = profile->theta_model;
  const DefaultPolicy& server = context.options->default_policy;
  if (!defaults->target_relative_error) {
    defaults->target_relative_error = server.target_relative_error;
  }
  if (!defaults->max_relative_error && server.max_relative_error > 0) {
    // The session's own target may already lie above.
    defaults->max_relative_error =
        std::max(server.max_relative_error, *defaults->target_relative_error);
  }
  if (defaults->mode || defaults->policy) return;
  const Policy policy = ParsePolicy(server.name).value_or(Policy::kBudget);
  defaults->mode = policy == Policy::kFullDepth ? AttendMode::kFullDepth
                   : policy == Policy::kStatic  ? AttendMode::kStatic
                                                : AttendMode::kStatistical;
  if (UsesLadder(policy)) defaults->policy = policy;
  if (!defaults->theta && server.theta > 0) defaults->theta = server.theta;
  if (!defaults->static_key_bits) defaults->static_key_bits = server.static_key_bits;
  if (!defaults->static_rank) defaults->static_rank = server.static_rank;
  if (!defaults->static_value_bits) defaults->static_value_bits = server.static_value_bits;
}

Policy PolicyOf(v1::Policy policy) {
  switch (policy) {
    case v1::POLICY_THRESHOLD:
      return Policy::kThreshold;
    case v1::POLICY_ENTROPY:
      return Policy::kEntropy;
    case v1::POLICY_LEARNED:
      return Policy::kLearned;
    case v1::POLICY_FEEDBACK:
      return Policy::kFeedback;
    default:
      return Policy::kBudget;
  }
}

v1::Policy ToProto(Policy policy) {
  switch (policy) {
    case Policy::kThreshold:
      return v1::POLICY_THRESHOLD;
    case Policy::kBudget:
      return v1::POLICY_BUDGET;
    case Policy::kEntropy:
      return v1::POLICY_ENTROPY;
    case Policy::kLearned:
      return v1::POLICY_LEARNED;
    case Policy::kFeedback:
      return v1::POLICY_FEEDBACK;
    default:
      return v1::POLICY_UNSPECIFIED;
  }
}

}  // namespace adaattn

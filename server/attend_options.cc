#include "server/attend_options.h"

#include "absl/strings/str_cat.h"

namespace adaattn {
namespace {

template <typename T>
T FirstOf(const std::optional<T>& message, const std::optional<T>& session, T otherwise) {
  return message ? *message : session ? *session : otherwise;
}

}  // namespace

const char* AttendModeName(AttendMode mode) {
  switch (mode) {
    case AttendMode::kExact:
      return "exact";
    case AttendMode::kFullDepth:
      return "full_depth";
    case AttendMode::kStatistical:
      return "statistical";
    case AttendMode::kStatic:
      return "static";
    case AttendMode::kDeterministic:
      return "deterministic";
  }
  return "unknown";
}

absl::StatusOr<ResolvedOptions> ResolveOptions(const AttendOptions& message,
                                               const AttendOptions& session, PageFormat format,
                                               bool exact_tier, int32_t head_dim) {
  const bool progressive = IsProgressive(format);
  ResolvedOptions resolved;
  resolved.mode = FirstOf(message.mode, session.mode,
                          progressive ? AttendMode::kStatistical : AttendMode::kExact);
  resolved.detail = FirstOf(message.detail, session.detail, DecisionDetail::kSummary);
  const bool deterministic = resolved.mode == AttendMode::kDeterministic;
  if (progressive && !exact_tier && (resolved.mode == AttendMode::kExact || deterministic)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "options.mode: ", deterministic ? "DETERMINISTIC" : "EXACT",
        " needs an exact tier, which this progressive session does not keep; the nearest mode is "
        "FULL_DEPTH"));
  }
  DecisionParams& decision = resolved.decision;
  switch (resolved.mode) {
    case AttendMode::kExact:
    case AttendMode::kFullDepth:
      decision.policy = Policy::kFullDepth;
      break;
    case AttendMode::kStatic:
      decision.policy = Policy::kStatic;
      break;
    case AttendMode::kDeterministic:
    case AttendMode::kStatistical:
      decision.policy = FirstOf(message.policy, session.policy, Policy::kBudget);
  }
  if (decision.policy == Policy::kLearned) {
    if (!session.theta_model) {
      return absl::FailedPreconditionError(
          "options.policy: LEARNED needs a policy file, of the session's profile "
          "(UploadProfile.policy_json) or of the server (setting policy-file)");
    }
    decision.theta_model = *session.theta_model;
  }
  // A theta means something else to another policy.
  const bool same_policy = session.policy.value_or(decision.policy) == decision.policy;
  decision.theta =
      FirstOf(message.theta, same_policy ? session.theta : std::nullopt,
              decision.policy == Policy::kEntropy ? kDefaultEntropyTheta : kDefaultTheta);
  decision.target_relative_error = FirstOf(
      message.target_relative_error, session.target_relative_error, decision.target_relative_error);
  decision.static_key_bits = FirstOf(message.static_key_bits, session.static_key_bits, 8);
  decision.static_rank = FirstOf(message.static_rank, session.static_rank, 0);
  decision.static_value_bits = FirstOf(message.static_value_bits, session.static_value_bits, 8);
  decision.floor_key_bits = FirstOf(message.floor_key_bits, session.floor_key_bits, 4);
  decision.floor_value_bits = FirstOf(message.floor_value_bits, session.floor_value_bits, 0);
  decision.coarse_rank = FirstOf(message.coarse_rank, session.coarse_rank,
                                 decision.policy == Policy::kThreshold ? head_dim / 2 : 0);
  decision.coarse_z = FirstOf(message.coarse_z, session.coarse_z, 2.0f);
  decision.bounded = deterministic;
  resolved.max_relative_error =
      FirstOf(message.max_relative_error, session.max_relative_error, 0.0f);
  return resolved;
}

}  // namespace adaattn

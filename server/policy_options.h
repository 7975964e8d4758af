#ifndef ADAATTN_SERVER_POLICY_OPTIONS_H_
#define ADAATTN_SERVER_POLICY_OPTIONS_H_

// What of AttendOptions concerns the choice of a policy: what contradicts it, what this device can
// do, what the server's own defaults add.

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "server/validation.h"

namespace adaattn {

// Errors: kInvalidArgument where a field says something that the mode or policy beside it does not
// use; kUnimplemented for a policy that the backend does not have, naming those it has.
absl::Status CheckPolicyFields(const v1::AttendOptions& options, absl::string_view field,
                               const BackendInfo& backend);

// Fills what a session's own defaults leave open from the server's. A session that names a mode or
// a policy keeps it, with the server's error targets; its profile's policy file goes before the
// server's.
void FillServerDefaults(const ValidationContext& context, const ModelProfile* profile,
                        AttendOptions* defaults);

Policy PolicyOf(v1::Policy policy);  // of one that is set
v1::Policy ToProto(Policy policy);   // UNSPECIFIED for what is a mode on the wire

}  // namespace adaattn

#endif  // ADAATTN_SERVER_POLICY_OPTIONS_H_

#ifndef ADAATTN_SERVER_POLICY_FILE_H_
#define ADAATTN_SERVER_POLICY_FILE_H_

#include <cstddef>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/policy/decision.h"

namespace adaattn {

inline constexpr int kPolicyFileVersion = 1;
inline constexpr size_t kMaxPolicyBytes = size_t{64} << 10;

// Reads a policy file, the weights of the learned policy as `python -m adaattn.fit_policy` writes
// them: {"format": "adaattn-policy", "version": 1, "features": [name...], "weights": [number...]},
// features those of kernels/policy/theta.h in their order. Other keys are for people.
// Errors: kInvalidArgument naming the key, what it holds and what it must hold. Any input is safe.
absl::StatusOr<ThetaModel> ParsePolicyFile(absl::string_view json);

// The same of a file; errors name the path, kNotFound where it cannot be read.
absl::StatusOr<ThetaModel> LoadPolicyFile(const std::string& path);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_POLICY_FILE_H_

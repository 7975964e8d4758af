#ifndef ADAATTN_SERVER_ATTEND_OPTIONS_H_
#define ADAATTN_SERVER_ATTEND_OPTIONS_H_

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "kernels/policy/decision.h"
#include "kernels/shape.h"

namespace adaattn {

enum class AttendMode : uint8_t {
  kExact = 0,
  kFullDepth = 1,
  kStatistical = 2,
  kStatic = 3,
  kDeterministic = 4
};
// "exact", "full_depth", "statistical", "static", "deterministic"
const char* AttendModeName(AttendMode mode);

enum class DecisionDetail : uint8_t { kNone = 0, kSummary = 1, kPerHead = 2 };

// What one message, or a session's defaults, says about how to attend. An absent field means "as
// the session says", and from the session "as the server says". The service validates the ranges
// (those of attention.proto) and leaves a field absent where the message has the default value.
struct AttendOptions {
  std::optional<AttendMode> mode;
  std::optional<Policy> policy;  // statistical mode: one that uses the ladder
  std::optional<float> theta;
  std::optional<float> target_relative_error;
  std::optional<float> max_relative_error;
  std::optional<int32_t> floor_key_bits;
  std::optional<int32_t> floor_value_bits;
  std::optional<int32_t> static_key_bits;
  std::optional<int32_t> static_rank;
  std::optional<int32_t> static_value_bits;
  std::optional<int32_t> coarse_rank;
  std::optional<float> coarse_z;
  std::optional<DecisionDetail> detail;
  std::optional<int64_t> window;          // of a message only: instead of the layer's
  std::optional<float> softcap;           // likewise
  std::optional<ThetaModel> theta_model;  // of a session only: what kLearned runs with
};

// theta where neither message nor session says one.
inline constexpr float kDefaultTheta = 0.004f;
inline constexpr float kDefaultEntropyTheta = 0.03f;

// The same, decided.
struct ResolvedOptions {
  AttendMode mode = AttendMode::kStatistical;
  DecisionDetail detail = DecisionDetail::kSummary;
  DecisionParams decision;
  float max_relative_error = 0;  // 0 = pressure may not raise the target
};

// The first of: message, session, built-in. A session's theta counts for the session's policy only.
// Built in: kStatistical with kBudget on progressive pages, kExact on dense ones; under kThreshold
// a coarse scan of half the rank, z = 2. (The server's own defaults are part of the session's.)
// kDeterministic takes a ladder policy as kStatistical does, in one stage, and bounds it.
// Errors: kFailedPrecondition for kExact and kDeterministic on progressive pages without an exact
// tier, naming FULL_DEPTH as the nearest, and for kLearned in a session without a model.
absl::StatusOr<ResolvedOptions> ResolveOptions(const AttendOptions& message,
                                               const AttendOptions& session, PageFormat format,
                                               bool exact_tier, int32_t head_dim);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_ATTEND_OPTIONS_H_

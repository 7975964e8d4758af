#ifndef ADAATTN_SERVER_VALIDATION_H_
#define ADAATTN_SERVER_VALIDATION_H_

// The one place where messages are checked and become the core's types. Errors name field, value
// and allowed range: kInvalidArgument for what is wrong, kUnimplemented for what this build cannot
// do (listing what it can), kFailedPrecondition where the session rules it out.

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "adaattn/v1/attention.pb.h"
#include "server/attention_task.h"
#include "server/options.h"
#include "server/profile_store.h"
#include "server/session_table.h"
#include "server/trace.h"
#include "server/wire.h"

namespace adaattn {

inline constexpr int32_t kMaxMessageSequences = 1024;
inline constexpr int64_t kMaxPosition = int64_t{1} << 40;
inline constexpr int32_t kMaxLayers = 1024;
inline constexpr int32_t kMaxKvHeads = 256;
inline constexpr int32_t kMaxForks = 64;

// What all checks need; all of it outlives this.
struct ValidationContext {
  const ServerOptions* options = nullptr;
  const BackendInfo* backend = nullptr;
  const ThetaModel* theta_model = nullptr;  // of the server's policy file; null = none
};

// Who calls.
struct Caller {
  std::string tenant = "default";
  std::string client;       // for admission: the tenant, or an address without a port
  std::string routing_key;  // "r" when the client sent none
  absl::Time deadline = absl::InfiniteFuture();
  TraceContext trace;
};

absl::StatusOr<SessionConfig> ValidateOpenSession(const v1::OpenSessionRequest& request,
                                                  const Caller& caller,
                                                  const ProfileStore& profiles,
                                                  const ValidationContext& context);

absl::StatusOr<AttendOptions> ValidateAttendOptions(const v1::AttendOptions& options,
                                                    absl::string_view field,
                                                    const ValidationContext& context);

// A task without `done`. Sequences that cannot be found carry their status instead; when none is
// found the task has no shape and its `payload_owner` is null: answer it without the engine.
absl::StatusOr<std::unique_ptr<AttentionTask>> ValidateAttend(AttendMessage message,
                                                              const Caller& caller,
                                                              SessionTable* sessions,
                                                              const ValidationContext& context);

// One chunk of an import; the task shares `request`.
absl::StatusOr<std::unique_ptr<AttentionTask>> ValidateImport(
    const std::shared_ptr<const v1::ImportKvRequest>& request,
    const std::shared_ptr<Session>& session, const Caller& caller);

// kNotFound: the caller's tenant has no profile that `request.extends` names.
absl::StatusOr<std::shared_ptr<const ModelProfile>> ValidateProfile(
    const v1::UploadProfileRequest& request, const Caller& caller, const ProfileStore& profiles,
    const ValidationContext& context);

// `tensor` has exactly `shape` and its bytes; FP8 only where `allow_fp8`. `bytes` is the length of
// its data, which may lie elsewhere.
absl::Status CheckTensor(absl::string_view field, const v1::Tensor& tensor, int64_t bytes,
                         absl::Span<const int64_t> shape, bool allow_fp8);

// The elements as floats, NaN and infinity refused. The tensor passed CheckTensor.
absl::StatusOr<std::vector<float>> TensorFloats(absl::string_view field, const v1::Tensor& tensor);

// kNotFound.
absl::Status NoProfile(absl::string_view field, absl::string_view name);

absl::Status CheckModel(const v1::ModelShape& model, absl::string_view field,
                        const ValidationContext& context);

// "field: value is not allowed; it must be allowed".
absl::Status InvalidField(absl::string_view field, absl::string_view value,
                          absl::string_view allowed);
template <typename Number>
absl::Status CheckRange(absl::string_view field, Number value, Number low, Number high);

DType DTypeOf(v1::DataType type);  // FP32 for what has none
v1::DataType ToProto(DType type);
// `unspecified` where the request names none; of progressive pages in `element_type`.
PageFormat PageFormatOf(v1::PageFormat format, v1::DataType element_type, PageFormat unspecified);
v1::PageFormat ToProto(PageFormat format);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_VALIDATION_H_

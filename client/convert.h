#ifndef ADAATTN_CLIENT_CONVERT_H_
#define ADAATTN_CLIENT_CONVERT_H_

// Between the plain structs of types.h and the messages of attention.proto. Internal: included by
// sources of the library only.

#include <grpcpp/support/status.h>

#include "absl/status/status.h"
#include "adaattn/v1/attention.pb.h"
#include "client/types.h"

namespace adaattn::client {

absl::Status FromGrpc(const grpc::Status& status);
absl::Status FromCode(int code, const std::string& message);

void ToProto(const TensorView& view, v1::Tensor* tensor);
void ToProto(const ModelShape& model, v1::ModelShape* message);
void ToProto(const SessionRef& session, v1::SessionRef* message);
void ToProto(const AttendOptions& options, v1::AttendOptions* message);
void ToProto(const SessionOptions& options, v1::OpenSessionRequest* message);
void ToProto(const AttendInput& input, v1::AttendRequest* message);
void ToProto(const ExportRange& range, v1::ExportKvRequest* message);
void ToProto(const Profile& profile, v1::UploadProfileRequest* message);

// These take the tensors' bytes out of the message.
Tensor FromProto(v1::Tensor* tensor);
AttendOutput FromProto(v1::AttendResponse* message);
ExportChunk FromProto(v1::ExportKvResponse* message);

SessionGrant FromProto(const v1::OpenSessionResponse& message);
SessionSummary FromProto(const v1::SessionSummary& message);
ServerInfo FromProto(const v1::GetServerInfoResponse& message);
ProfileSummary FromProto(const v1::GetProfileResponse& message);
Lease FromProto(const v1::KeepAliveResponse::Lease& message);

}  // namespace adaattn::client

#endif  // ADAATTN_CLIENT_CONVERT_H_

#include "server/call.h"

#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/log.h"
#include "server/session_id.h"

namespace adaattn {
namespace {

constexpr char kRoute[] = "adaattn-route";
constexpr char kTraceparent[] = "traceparent";
constexpr char kDefaultRoute[] = "r";

std::string MetadataValue(const grpc::CallbackServerContext& context, const char* name) {
  const auto& metadata = context.client_metadata();
  const auto found = metadata.find(name);
  return found == metadata.end() ? "" : std::string(found->second.data(), found->second.size());
}

// The first subject alternative name of a verified client certificate; "" without one.
std::string CertificateName(const grpc::CallbackServerContext& context) {
  const auto auth = context.auth_context();
  if (auth == nullptr || !auth->IsPeerAuthenticated()) return "";
  const auto names = auth->FindPropertyValues("x509_subject_alternative_name");
  return names.empty() ? "" : std::string(names[0].data(), names[0].size());
}

// "ipv4:10.0.0.1:5000" without the port: one client may hold many connections.
std::string PeerAddress(const std::string& peer) {
  return absl::StartsWith(peer, "unix") ? "unix" : peer.substr(0, peer.rfind(':'));
}

}  // namespace

void StreamRegistry::Add(grpc::CallbackServerContext* context) {
  const MutexLock lock(&mutex_);
  open_.insert(context);
}

void StreamRegistry::Remove(grpc::CallbackServerContext* context) {
  const MutexLock lock(&mutex_);
  open_.erase(context);
}

void StreamRegistry::CancelAll() {
  const MutexLock lock(&mutex_);
  for (grpc::CallbackServerContext* context : open_) context->TryCancel();
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()));
}

absl::StatusOr<Caller> MakeCaller(const grpc::CallbackServerContext& context) {
  Caller caller;
  caller.tenant = CertificateName(context);
  caller.client = caller.tenant.empty() ? PeerAddress(context.peer()) : caller.tenant;
  if (caller.tenant.empty()) caller.tenant = "default";
  caller.routing_key = MetadataValue(context, kRoute);
  if (caller.routing_key.empty()) caller.routing_key = kDefaultRoute;
  if (!IsValidRoutingKey(caller.routing_key)) {
    return InvalidField(absl::StrCat("metadata ", kRoute), caller.routing_key,
                        "1 to 64 characters of [A-Za-z0-9._-]");
  }
  caller.trace = ParseTraceparent(MetadataValue(context, kTraceparent));
  caller.deadline = absl::FromChrono(context.deadline());
  // gRPC's "none" is the last moment that its clock can tell.
  if (context.deadline() == std::chrono::system_clock::time_point::max()) {
    caller.deadline = absl::InfiniteFuture();
  }
  if (LogEnabled(LogLevel::kDebug)) {
    Log(LogLevel::kDebug, "call",
        {{"client", caller.client}, {"traceparent", MetadataValue(context, kTraceparent)}});
  }
  return caller;
}

WireTransport TransportOf(const grpc::CallbackServerContext& context) {
  return absl::StartsWith(context.peer(), "unix") ? WireTransport::kUnix : WireTransport::kTcp;
}

void SetRetryAfter(grpc::CallbackServerContext* context, absl::Duration retry_after) {
  if (retry_after <= absl::ZeroDuration()) return;
  context->AddTrailingMetadata("adaattn-retry-after-seconds",
                               absl::StrCat(absl::ToDoubleSeconds(retry_after)));
}

absl::Duration RetryAfter(const ServiceContext& service, const absl::Status& status) {
  if (!absl::IsResourceExhausted(status) && !absl::IsUnavailable(status)) {
    return absl::ZeroDuration();
  }
  return std::max(service.engine->retry_after(), absl::Milliseconds(1));
}

}  // namespace adaattn

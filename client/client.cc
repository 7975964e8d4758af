#include "client/client.h"

#include <algorithm>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/random/random.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "client/connection.h"
#include "client/convert.h"

namespace adaattn::client {
namespace {

constexpr int32_t kMaxChannels = 64;
constexpr size_t kMaxRouteKey = 64;
constexpr int32_t kSessionsPerPage = 1000;

absl::Status CheckRouteKey(const std::string& key) {
  const bool characters = std::all_of(key.begin(), key.end(), [](unsigned char c) {
    return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-';
  });
  if (characters && key.size() <= kMaxRouteKey) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "route_key \"", key, "\": must be 1 to 64 characters of [A-Za-z0-9._-], or empty"));
}

absl::Status CheckOptions(const ClientOptions& options) {
  if (options.address.empty()) {
    return absl::InvalidArgumentError("address \"\": must be host:port or unix:path");
  }
  if (options.num_channels < 1 || options.num_channels > kMaxChannels) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_channels ", options.num_channels, ": must be 1 to ", kMaxChannels));
  }
  if (options.deadline <= absl::ZeroDuration() || options.import_deadline <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError("deadline and import_deadline must be above 0");
  }
  if (options.max_message_bytes < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_message_bytes ", options.max_message_bytes, ": must be 1 or more"));
  }
  if (options.retry.max_attempts < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("retry.max_attempts ", options.retry.max_attempts, ": must be 1 or more"));
  }
  return CheckRouteKey(options.route_key);
}

std::string RandomRouteKey() {
  absl::BitGen random;
  return absl::StrCat(absl::Hex(absl::Uniform<uint64_t>(random), absl::kZeroPad16));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Client>> Client::Create(const ClientOptions& options) {
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  ClientOptions complete = options;
  if (complete.route_key.empty()) complete.route_key = RandomRouteKey();
  return absl::WrapUnique(new Client(std::make_shared<Connection>(std::move(complete))));
}

Client::Client(std::shared_ptr<Connection> connection) : connection_(std::move(connection)) {}
Client::~Client() = default;

absl::StatusOr<ServerInfo> Client::GetServerInfo() {
  v1::GetServerInfoResponse response;
  const absl::Status status =
      connection_->Call(&v1::Attention::Stub::GetServerInfo, "", RetryRule::kRepeatable,
                        v1::GetServerInfoRequest(), &response);
  if (!status.ok()) return status;
  return FromProto(response);
}

absl::StatusOr<std::unique_ptr<Session>> Client::OpenSession(const SessionOptions& options) {
  if (absl::Status status = CheckRouteKey(options.route_key); !status.ok()) return status;
  v1::OpenSessionRequest request;
  ToProto(options, &request);
  const std::string& route = connection_->RouteKey(options.route_key);
  v1::OpenSessionResponse response;
  const absl::Status status = connection_->Call(&v1::Attention::Stub::OpenSession, route,
                                                RetryRule::kCreates, request, &response);
  if (!status.ok()) return status;
  return absl::WrapUnique(new Session(connection_, {response.session_id(), response.epoch()},
                                      FromProto(response), route, options.start_position,
                                      std::vector<Session::LayerState>(options.model.num_layers)));
}

absl::StatusOr<AttendOutput> Client::Attend(const AttendInput& input,
                                            const std::string& route_key) {
  v1::AttendRequest request;
  ToProto(input, &request);
  return connection_->Attend(route_key, request);
}

std::unique_ptr<AttendStream> Client::OpenStream(const StreamOptions& options) {
  return absl::WrapUnique(new AttendStream(connection_, options));
}

absl::StatusOr<std::vector<SessionSummary>> Client::ListSessions() {
  std::vector<SessionSummary> sessions;
  v1::ListSessionsRequest request;
  request.set_page_size(kSessionsPerPage);
  do {
    v1::ListSessionsResponse response;
    const absl::Status status = connection_->Call(&v1::Attention::Stub::ListSessions, "",
                                                  RetryRule::kRepeatable, request, &response);
    if (!status.ok()) return status;
    for (const v1::SessionSummary& session : response.sessions()) {
      sessions.push_back(FromProto(session));
    }
    request.set_page_token(response.next_page_token());
  } while (!request.page_token().empty());
  return sessions;
}

absl::StatusOr<std::vector<Lease>> Client::KeepAlive(absl::Span<const SessionRef> sessions,
                                                     const std::string& route_key) {
  v1::KeepAliveRequest request;
  for (const SessionRef& session : sessions) ToProto(session, request.add_sessions());
  v1::KeepAliveResponse response;
  const absl::Status status = connection_->Call(&v1::Attention::Stub::KeepAlive, route_key,
                                                RetryRule::kRepeatable, request, &response);
  if (!status.ok()) return status;
  std::vector<Lease> leases;
  for (const auto& lease : response.leases()) leases.push_back(FromProto(lease));
  return leases;
}

absl::Status Client::CloseSession(const SessionRef& session, const std::string& route_key) {
  v1::CloseSessionRequest request;
  ToProto(session, request.mutable_session());
  v1::CloseSessionResponse response;
  return connection_->Call(&v1::Attention::Stub::CloseSession, route_key, RetryRule::kRepeatable,
                           request, &response);
}

absl::StatusOr<int64_t> Client::UploadProfile(const Profile& profile) {
  v1::UploadProfileRequest request;
  ToProto(profile, &request);
  v1::UploadProfileResponse response;
  const absl::Status status = connection_->Call(&v1::Attention::Stub::UploadProfile, "",
                                                RetryRule::kRepeatable, request, &response);
  if (!status.ok()) return status;
  return response.bytes();
}

absl::StatusOr<ProfileSummary> Client::GetProfile(const std::string& name) {
  v1::GetProfileRequest request;
  request.set_name(name);
  v1::GetProfileResponse response;
  const absl::Status status = connection_->Call(&v1::Attention::Stub::GetProfile, "",
                                                RetryRule::kRepeatable, request, &response);
  if (!status.ok()) return status;
  return FromProto(response);
}

}  // namespace adaattn::client

#ifndef ADAATTN_CLIENT_CLIENT_H_
#define ADAATTN_CLIENT_CLIENT_H_

// The C++ client of an AdaAttn server.
//
//   ClientOptions options;
//   options.address = "unix:/run/adaattn.sock";
//   auto client = Client::Create(options);
//   auto session = (*client)->OpenSession({{/*num_layers=*/32, 12, 2, 128}});
//   (*session)->Import({/*first_layer=*/0, k, v});
//   auto answer = (*session)->Attend({/*layer=*/0, /*append_len=*/1, /*q_len=*/1, q, k1, v1});
//
// Every call has a deadline, and is asked again by the append-once rule: a step states its position
// and its step id, so the server recognises a step that it has already applied and answers it
// without appending twice. docs/api.md says which errors are asked again.

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/attend_stream.h"
#include "client/retry.h"
#include "client/session.h"
#include "client/types.h"

namespace adaattn::client {

class Connection;

struct ClientOptions {
  std::string address;       // "host:port" or "unix:path"; plaintext
  int32_t num_channels = 1;  // connections; sessions and streams take them in turn, 1 to 64
  // Metadata `adaattn-route` of calls without a key of their own: 1 to 64 characters of
  // [A-Za-z0-9._-]; "" = a random one.
  std::string route_key;
  absl::Duration deadline = absl::Seconds(30);         // of one attempt; > 0
  absl::Duration import_deadline = absl::Minutes(10);  // of one Import or Export; > 0
  int64_t max_message_bytes = int64_t{256} << 20;      // longest answer accepted
  RetryOptions retry;
};

// A server, or what stands in front of several. Threads: any, at the same time. Lifetime: sessions
// and streams keep what they need; they may outlive the client.
class Client {
 public:
  // Connects lazily: an unreachable server shows in the first call, as kUnavailable.
  // Errors: kInvalidArgument naming the option.
  static absl::StatusOr<std::unique_ptr<Client>> Create(const ClientOptions& options);
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;
  ~Client();

  absl::StatusOr<ServerInfo> GetServerInfo();
  absl::StatusOr<std::unique_ptr<Session>> OpenSession(const SessionOptions& options);

  // One message for one or more sequences, whose sessions share a route key. A message that lost
  // its answer is asked again with the same step ids and positions. OK means that the message was
  // processed: each sequence has a status of its own.
  absl::StatusOr<AttendOutput> Attend(const AttendInput& input, const std::string& route_key = "");

  std::unique_ptr<AttendStream> OpenStream(const StreamOptions& options = {});

  // The caller's own sessions, all pages of the list.
  absl::StatusOr<std::vector<SessionSummary>> ListSessions();
  // One lease per session, in order; sessions share a route key.
  absl::StatusOr<std::vector<Lease>> KeepAlive(absl::Span<const SessionRef> sessions,
                                               const std::string& route_key = "");
  absl::Status CloseSession(const SessionRef& session, const std::string& route_key = "");
  // Returns the host memory that the profile takes, in bytes.
  absl::StatusOr<int64_t> UploadProfile(const Profile& profile);
  absl::StatusOr<ProfileSummary> GetProfile(const std::string& name);

 private:
  explicit Client(std::shared_ptr<Connection> connection);

  const std::shared_ptr<Connection> connection_;
};

}  // namespace adaattn::client

#endif  // ADAATTN_CLIENT_CLIENT_H_

#ifndef ADAATTN_CLIENT_CONNECTION_H_
#define ADAATTN_CLIENT_CONNECTION_H_

// The channels of a client and the one way to make a call. Internal to the library.

#include <grpcpp/client_context.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "adaattn/v1/attention.grpc.pb.h"
#include "client/client.h"
#include "client/convert.h"

namespace adaattn::client {

// Threads: any.
class Connection {
 public:
  explicit Connection(ClientOptions options);

  const ClientOptions& options() const { return options_; }
  // `key`, or the client's own where that is empty.
  const std::string& RouteKey(const std::string& key) const;

  // Channels in turn.
  v1::Attention::Stub* NextStub();

  // Sets the deadline of one attempt and the route.
  void Prepare(grpc::ClientContext* context, const std::string& route_key,
               absl::Duration deadline) const;

  // A unary call, asked again by `rule`.
  template <typename Request, typename Response>
  absl::Status Call(grpc::Status (v1::Attention::Stub::*method)(grpc::ClientContext*,
                                                                const Request&, Response*),
                    const std::string& route_key, RetryRule rule, const Request& request,
                    Response* response) {
    RetryState retry(options_.retry, rule);
    while (true) {
      grpc::ClientContext context;
      Prepare(&context, route_key, options_.deadline);
      absl::Status status = FromGrpc((NextStub()->*method)(&context, request, response));
      if (status.ok()) return status;
      const auto wait = retry.Next(status, RetryHint(context));
      if (!wait) return status;
      SleepBetween(options_.retry, *wait);
    }
  }

  // Attend, asked again by the append-once rule; a single sequence's error counts as the message's.
  absl::StatusOr<AttendOutput> Attend(const std::string& route_key,
                                      const v1::AttendRequest& request);

  // When the server asked to be asked again (trailing metadata); zero = it did not say.
  static absl::Duration RetryHint(const grpc::ClientContext& context);

 private:
  const ClientOptions options_;
  std::vector<std::unique_ptr<v1::Attention::Stub>> stubs_;
  std::atomic<uint32_t> next_{0};
};

// Trailing metadata with which a server says when to ask again.
inline constexpr char kRetryAfter[] = "adaattn-retry-after-seconds";
inline constexpr char kRouteMetadata[] = "adaattn-route";

}  // namespace adaattn::client

#endif  // ADAATTN_CLIENT_CONNECTION_H_

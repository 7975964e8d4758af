#include "client/connection.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"

namespace adaattn::client {

Connection::Connection(ClientOptions options) : options_(std::move(options)) {
  grpc::ChannelArguments arguments;
  const int64_t limit = std::numeric_limits<int>::max();
  arguments.SetMaxReceiveMessageSize(
      static_cast<int>(std::min<int64_t>(options_.max_message_bytes, limit)));
  arguments.SetMaxSendMessageSize(-1);  // the server's limit counts, and names itself
  // Appends must not be repeated by the transport: this library repeats them, with their step ids.
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  // Channels to one address share a connection otherwise.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2000);
  for (int32_t i = 0; i < options_.num_channels; ++i) {
    stubs_.push_back(v1::Attention::NewStub(grpc::CreateCustomChannel(
        options_.address, grpc::InsecureChannelCredentials(), arguments)));
  }
}

const std::string& Connection::RouteKey(const std::string& key) const {
  return key.empty() ? options_.route_key : key;
}

v1::Attention::Stub* Connection::NextStub() {
  return stubs_[next_.fetch_add(1, std::memory_order_relaxed) % stubs_.size()].get();
}

void Connection::Prepare(grpc::ClientContext* context, const std::string& route_key,
                         absl::Duration deadline) const {
  context->AddMetadata(kRouteMetadata, RouteKey(route_key));
  if (deadline != absl::InfiniteDuration()) {
    context->set_deadline(absl::ToChronoTime(absl::Now() + deadline));
  }
}

absl::StatusOr<AttendOutput> Connection::Attend(const std::string& route_key,
                                                const v1::AttendRequest& request) {
  RetryState retry(options_.retry, RetryRule::kRepeatable);
  while (true) {
    grpc::ClientContext context;
    Prepare(&context, route_key, options_.deadline);
    v1::AttendResponse response;
    absl::Status status = FromGrpc(NextStub()->Attend(&context, request, &response));
    absl::Duration hint = RetryHint(context);
    if (status.ok()) {
      // Of a message with one sequence, the sequence's error is as repeatable as the message's.
      const bool single = response.sequences_size() == 1;
      if (!single || response.sequences(0).code() == 0) return FromProto(&response);
      status = FromCode(response.sequences(0).code(), response.sequences(0).message());
      hint = absl::Seconds(response.retry_after_seconds());
      const auto wait = retry.Next(status, hint);
      if (!wait) return FromProto(&response);
      SleepBetween(options_.retry, *wait);
      continue;
    }
    const auto wait = retry.Next(status, hint);
    if (!wait) return status;
    SleepBetween(options_.retry, *wait);
  }
}

absl::Duration Connection::RetryHint(const grpc::ClientContext& context) {
  const auto& metadata = context.GetServerTrailingMetadata();
  const auto found = metadata.find(kRetryAfter);
  if (found == metadata.end()) return absl::ZeroDuration();
  double seconds = 0;
  const absl::string_view text(found->second.data(), found->second.size());
  // Not a number, or NaN: no hint.
  if (!absl::SimpleAtod(text, &seconds) || !(seconds > 0)) return absl::ZeroDuration();
  return absl::Seconds(seconds);
}

}  // namespace adaattn::client

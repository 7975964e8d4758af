#ifndef ADAATTN_SERVER_SESSION_ID_H_
#define ADAATTN_SERVER_SESSION_ID_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace adaattn {

// What a session id says: "<routing key>~<instance>~<epoch>~<token>", opaque to clients. '~' is in
// no other part. The token is random, so that an id cannot be guessed from another.
struct SessionId {
  std::string routing_key;  // 1 to 64 characters of [A-Za-z0-9._-]
  std::string instance;     // of the server process that opened it
  uint64_t epoch = 0;
  uint64_t token = 0;

  std::string ToString() const;
};

inline constexpr int kMaxRoutingKey = 64;
inline constexpr int kMaxSessionIdLength = 192;

bool IsValidRoutingKey(absl::string_view key);

// kInvalidArgument when `text` was made by no server.
absl::StatusOr<SessionId> ParseSessionId(absl::string_view text);

// 16 hex digits, different in every process.
std::string MakeInstanceName();

}  // namespace adaattn

#endif  // ADAATTN_SERVER_SESSION_ID_H_

#include "server/session_id.h"

#include <algorithm>
#include <random>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace adaattn {
namespace {

absl::Status NotOurs() {
  return absl::InvalidArgumentError(
      "session_id: not an id of this service; use what OpenSession returned");
}

}  // namespace

std::string SessionId::ToString() const {
  return absl::StrCat(routing_key, "~", instance, "~", epoch, "~",
                      absl::Hex(token, absl::kZeroPad16));
}

bool IsValidRoutingKey(absl::string_view key) {
  return !key.empty() && key.size() <= kMaxRoutingKey &&
         std::all_of(key.begin(), key.end(), [](unsigned char c) {
           return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-';
         });
}

absl::StatusOr<SessionId> ParseSessionId(absl::string_view text) {
  if (text.size() > kMaxSessionIdLength) return NotOurs();
  const std::vector<absl::string_view> parts = absl::StrSplit(text, '~');
  SessionId id;
  if (parts.size() != 4 || !IsValidRoutingKey(parts[0]) || !IsValidRoutingKey(parts[1]) ||
      parts[3].size() != 16 || !absl::SimpleAtoi(parts[2], &id.epoch) ||
      !absl::SimpleHexAtoi(parts[3], &id.token)) {
    return NotOurs();
  }
  id.routing_key = std::string(parts[0]);
  id.instance = std::string(parts[1]);
  // SimpleAtoi takes blanks, signs and leading zeros: only the spelling that we make is ours.
  if (id.ToString() != text) return NotOurs();
  return id;
}

std::string MakeInstanceName() {
  std::random_device device;
  const uint64_t value = (uint64_t{device()} << 32) | device();
  return absl::StrCat(absl::Hex(value, absl::kZeroPad16));
}

}  // namespace adaattn

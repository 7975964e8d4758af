#include <arpa/inet.h>
#include <sys/un.h>

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "server/options.h"
#include "server/trace.h"

namespace adaattn {
namespace {

struct NamedAddress {
  const char* setting;
  const std::string& text;
};

absl::Status CheckAddresses(const ServerOptions& options) {
  const NamedAddress addresses[] = {{"listen", options.listen},
                                    {"metrics-listen", options.metrics_listen},
                                    {"admin-listen", options.admin_listen}};
  std::vector<std::pair<const char*, HostPort>> seen;
  for (const NamedAddress& address : addresses) {
    if (address.text.empty()) continue;
    absl::StatusOr<HostPort> parsed = ParseHostPort(address.text);
    if (!parsed.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("setting ", address.setting, ": ", parsed.status().message()));
    }
    for (const auto& [other, taken] : seen) {
      // Different spellings of one host are not told apart; the bind will.
      if (parsed->port != 0 && parsed->port == taken.port && parsed->host == taken.host) {
        return absl::InvalidArgumentError(absl::StrCat("settings ", other, " and ", address.setting,
                                                       " both ask for ", address.text));
      }
    }
    seen.emplace_back(address.setting, *parsed);
  }
  if (options.listen.empty() && options.unix_socket.empty()) {
    return absl::InvalidArgumentError("settings listen and unix-socket are both empty");
  }
  if (options.unix_socket.size() >= sizeof(sockaddr_un::sun_path)) {
    return absl::InvalidArgumentError(
        absl::StrCat("setting unix-socket: a path of ", options.unix_socket.size(),
                     " bytes; at most ", sizeof(sockaddr_un::sun_path) - 1, " are allowed"));
  }
  return absl::OkStatus();
}

absl::Status CheckSecurity(const ServerOptions& options) {
  if (options.tls_cert.empty() != options.tls_key.empty()) {
    return absl::InvalidArgumentError("settings tls-cert and tls-key go together; one is empty");
  }
  if (options.tls_cert.empty() && !options.tls_ca.empty()) {
    return absl::InvalidArgumentError("setting tls-ca needs tls-cert and tls-key");
  }
  const bool tls = !options.tls_cert.empty();
  if (tls || options.allow_plaintext || options.listen.empty()) return absl::OkStatus();
  absl::StatusOr<HostPort> address = ParseHostPort(options.listen);
  if (!address.ok()) return address.status();
  if (IsLoopback(address->host)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("setting listen: plaintext on \"", options.listen,
                   "\", which is not loopback; set tls-cert and tls-key, or allow-plaintext"));
}

absl::Status CheckOrder(const char* less, double smaller, const char* more, double larger) {
  if (smaller <= larger) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("setting ", less, " (", smaller, ") must not exceed ", more, " (", larger, ")"));
}

absl::Status CheckPolicy(const DefaultPolicy& policy, const std::string& file) {
  if (policy.name == "learned" && file.empty()) {
    return absl::InvalidArgumentError("setting default-policy: learned needs a policy-file");
  }
  for (const auto& [name, bits] :
       {std::make_pair("default-static-key-bits", policy.static_key_bits),
        {"default-static-value-bits", policy.static_value_bits}}) {
    if (bits % 2 == 0) continue;
    return absl::InvalidArgumentError(absl::StrCat("setting ", name, ": ", bits, " is odd"));
  }
  if (policy.max_relative_error == 0) return absl::OkStatus();
  return CheckOrder("default-target-relative-error", policy.target_relative_error,
                    "default-max-relative-error", policy.max_relative_error);
}

}  // namespace

absl::Status ValidateOptions(const ServerOptions& options) {
  const auto real = [](int64_t value) { return static_cast<double>(value); };
  const int64_t message = options.max_message_bytes;
  for (const absl::Status& status :
       {CheckAddresses(options), CheckSecurity(options),
        CheckPolicy(options.default_policy, options.policy_file),
        CheckOrder("default-lease", absl::ToDoubleSeconds(options.default_lease), "max-lease",
                   absl::ToDoubleSeconds(options.max_lease)),
        // A message that is allowed by its size must be able to get in at all.
        CheckOrder("max-message-bytes", real(message), "max-queued-bytes",
                   real(options.engine.batcher.max_queued_bytes)),
        CheckOrder("max-message-bytes", real(message), "max-client-inflight-bytes",
                   real(options.admission.max_client_inflight_bytes)),
        CheckOrder("max-client-inflight-bytes", real(options.admission.max_client_inflight_bytes),
                   "max-inflight-bytes", real(options.admission.max_inflight_bytes))}) {
    if (!status.ok()) return status;
  }
  if (!options.trace_endpoint.empty()) {
    const absl::Status status = ParseTraceEndpoint(options.trace_endpoint).status();
    if (!status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("setting trace-endpoint: ", status.message()));
    }
  }
  if (options.engine.seal.fit_tokens % kPageTokens != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("setting fit-tokens: ", options.engine.seal.fit_tokens,
                     " is not a multiple of ", kPageTokens));
  }
  return absl::OkStatus();
}

absl::StatusOr<HostPort> ParseHostPort(absl::string_view address) {
  const size_t colon = address.rfind(':');
  HostPort parsed;
  if (colon != absl::string_view::npos &&
      absl::SimpleAtoi(address.substr(colon + 1), &parsed.port)) {
    absl::string_view host = address.substr(0, colon);
    const bool bracketed = absl::ConsumePrefix(&host, "[") && absl::ConsumeSuffix(&host, "]");
    const bool plain = host.find_first_of(":[]") == absl::string_view::npos;
    parsed.host = std::string(host);
    if (!host.empty() && (bracketed || plain) && parsed.port >= 0 && parsed.port <= 65535) {
      return parsed;
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("\"", address, "\" is not host:port with a port from 0 to 65535"));
}

bool IsLoopback(absl::string_view host) {
  in_addr v4;
  const bool is_v4 = inet_pton(AF_INET, std::string(host).c_str(), &v4) == 1;
  return host == "localhost" || host == "::1" || (is_v4 && absl::StartsWith(host, "127."));
}

}  // namespace adaattn

#include "server/preflight.h"

#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace adaattn {
namespace {

absl::Status CheckPem(const char* setting, const std::string& path) {
  if (path.empty()) return absl::OkStatus();
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  if (!file) {
    return absl::InvalidArgumentError(
        absl::StrCat("setting ", setting, ": cannot read \"", path, "\""));
  }
  if (absl::StrContains(text.str(), "-----BEGIN ")) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("setting ", setting, ": \"", path, "\" is no PEM file"));
}

// A file is written beside `path` and removed.
absl::Status CheckWritable(const char* setting, const std::string& path) {
  if (path.empty()) return absl::OkStatus();
  const std::string probe = absl::StrCat(path, ".tmp");
  if (std::ofstream(probe) && std::remove(probe.c_str()) == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("setting ", setting, ": cannot write \"", path, "\": ", std::strerror(errno)));
}

absl::Status CheckFree(const char* setting, const std::string& address) {
  if (address.empty()) return absl::OkStatus();
  absl::StatusOr<HostPort> parsed = ParseHostPort(address);
  if (!parsed.ok()) return parsed.status();
  if (parsed->port == 0) return absl::OkStatus();
  addrinfo hints;
  std::memset(&hints, 0, sizeof(hints));
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int error =
      getaddrinfo(parsed->host.c_str(), std::to_string(parsed->port).c_str(), &hints, &found);
  if (error != 0) {
    return absl::InvalidArgumentError(absl::StrCat("setting ", setting, ": no address \"",
                                                   parsed->host, "\": ", gai_strerror(error)));
  }
  const int probe = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int on = 1;
  if (probe >= 0) setsockopt(probe, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  const bool bound = probe >= 0 && bind(probe, found->ai_addr, found->ai_addrlen) == 0;
  const int reason = errno;
  if (probe >= 0) close(probe);
  freeaddrinfo(found);
  if (bound) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("setting ", setting, ": cannot listen on \"", address,
                                             "\": ", std::strerror(reason)));
}

}  // namespace

absl::Status Preflight(const ServerOptions& options) {
  for (const absl::Status& status :
       {CheckPem("tls-cert", options.tls_cert), CheckPem("tls-key", options.tls_key),
        CheckPem("tls-ca", options.tls_ca), CheckWritable("port-file", options.port_file),
        CheckWritable("unix-socket", options.unix_socket), CheckFree("listen", options.listen),
        CheckFree("metrics-listen", options.metrics_listen),
        CheckFree("admin-listen", options.admin_listen)}) {
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace adaattn

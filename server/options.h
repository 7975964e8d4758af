#ifndef ADAATTN_SERVER_OPTIONS_H_
#define ADAATTN_SERVER_OPTIONS_H_

#include <cstdint>
#include <limits>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kernels/attention.h"
#include "server/admission.h"
#include "server/engine.h"
#include "server/session_table.h"

namespace adaattn {

// Everything that can be set; SettingTable() says what each field means.
// How progressive sessions are attended that say nothing about it.
struct DefaultPolicy {
  std::string name = "budget";  // PolicyName
  float theta = 0;              // 0 = the policy's own
  float target_relative_error = 0.05f;
  float max_relative_error = 0;  // 0 = pressure never raises the target
  int32_t static_key_bits = 8;
  int32_t static_rank = 0;
  int32_t static_value_bits = 8;
};

struct ServerOptions {
  std::string listen = "127.0.0.1:7470";
  std::string unix_socket;
  std::string metrics_listen = "127.0.0.1:7471";
  std::string admin_listen;
  std::string port_file;
  std::string trace_endpoint;
  std::string log_level = "info";

  bool allow_plaintext = false;
  std::string tls_cert, tls_key, tls_ca;
  absl::Duration tls_reload = absl::Seconds(10);

  std::string backend = "auto";
  BackendOptions device;

  int64_t max_message_bytes = int64_t{64} << 20;
  int64_t max_tokens_per_session = int64_t{1} << 20;
  int32_t max_connection_streams = 256;
  int32_t stream_window = 32;
  int64_t memory_quota_bytes = int64_t{4} << 30;
  int64_t max_tenant_profile_bytes = int64_t{1} << 30;
  AdmissionOptions admission;
  SessionTableOptions sessions;
  absl::Duration default_lease = absl::Minutes(5);
  absl::Duration max_lease = absl::Hours(1);
  std::string default_page_format = "progressive";
  DefaultPolicy default_policy;
  std::string policy_file;  // of the learned policy; "" = none

  EngineOptions engine;

  absl::Duration drain_pause = absl::Seconds(5);
  absl::Duration drain_deadline = absl::Seconds(30);
};

// One setting: `--name=value` on the command line, "name": value in the config file.
struct Setting {
  using Target =
      std::variant<std::string*, bool*, int32_t*, int64_t*, double*, float*, absl::Duration*>;
  const char* name;
  Target target;
  const char* help;  // unit, meaning of 0, trade-off
  double min = 0;    // of numbers and durations (seconds), inclusive
  double max = std::numeric_limits<double>::infinity();
  std::vector<std::string> choices = {};  // of strings; empty = any

  std::string ValueText() const;  // as one would write it
};

// Every setting, bound to the fields of `options`.
std::vector<Setting> SettingTable(ServerOptions* options);

// Sets one field from text. Errors: kInvalidArgument naming setting, value and allowed range.
absl::Status ApplySetting(const Setting& setting, absl::string_view text);

// Applies a flat JSON object of settings. Errors: kInvalidArgument naming the unknown or bad key.
absl::Status ApplyConfigJson(absl::string_view json, ServerOptions* options);

// What no single setting can know: clashing addresses, half a certificate, plaintext on a public
// address, limits that contradict each other. Errors: kInvalidArgument naming the settings.
absl::Status ValidateOptions(const ServerOptions& options);

// The settings as a JSON object that ApplyConfigJson reads back.
std::string OptionsJson(ServerOptions options);

enum class Action : uint8_t { kServe, kHelp, kVersion, kPrintMetrics, kPrintConfig };

struct CommandLine {
  Action action = Action::kServe;
  ServerOptions options;
};

// `args` without the program's name. The file of --config is applied first, flags over it, then all
// is validated. Errors: kInvalidArgument naming the setting; kNotFound for the config file.
absl::StatusOr<CommandLine> ParseCommandLine(absl::Span<const std::string> args);

std::string HelpText();

struct HostPort {
  std::string host;  // without brackets
  int port = 0;
};
// "host:port", "[v6]:port". kInvalidArgument for anything else.
absl::StatusOr<HostPort> ParseHostPort(absl::string_view address);
bool IsLoopback(absl::string_view host);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_OPTIONS_H_

#ifndef ADAATTN_CLIENT_CLI_COMMANDS_H_
#define ADAATTN_CLIENT_CLI_COMMANDS_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cli_args.h"
#include "client/client.h"

namespace adaattn::client {

// How the command line ends.
enum ExitCode : int {
  kExitOk = 0,
  kExitFailed = 1,       // the server refused, or answered wrongly
  kExitUsage = 2,        // arguments or files that make no sense
  kExitUnreachable = 3,  // UNAVAILABLE, CANCELLED or DEADLINE_EXCEEDED, retries included
  kExitLimit = 4,        // a replay outside the limits that were asked for
};
int ExitCodeOf(const absl::Status& status);
// Says on stderr what is wrong with the arguments; returns kExitUsage.
int UsageError(const absl::Status& status);

// One subcommand. `run` prints its result to stdout and returns an exit code; a status it returns
// is printed by main.
struct Command {
  std::string name;
  std::string usage;  // positional arguments
  std::string help;
  std::vector<Flag> flags;
  absl::StatusOr<int> (*run)(const Args& args) = nullptr;
};

// Flags that every command takes: --address, --deadline, --json.
std::vector<Flag> CommonFlags();
absl::StatusOr<std::unique_ptr<Client>> Connect(const Args& args);
// A finite number of at least `least` and at most `most`, or kInvalidArgument naming the flag.
absl::Status CheckRange(const Args& args, const std::string& flag, double least, double most);

Command InfoCommand();
Command SessionsCommand();
Command ProfileCommand();
Command ReplayCommand();
Command BenchCommand();
Command DemoCommand();

// --mode, --page-format and the other flags that say how to attend, for replay and bench.
std::vector<Flag> AttendFlags();
// What they say, for the mode of that name ("" = the server's default).
struct AttendChoice {
  PageFormat page_format = PageFormat::kProgressive;
  DType element_type = DType::kUnspecified;
  int32_t stored_bits = 0;
  ExactTier exact_tier = ExactTier::kNone;
  AttendOptions options;
};
absl::StatusOr<AttendChoice> ParseAttendFlags(const Args& args, const std::string& mode);

}  // namespace adaattn::client

#endif  // ADAATTN_CLIENT_CLI_COMMANDS_H_

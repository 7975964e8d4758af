// adaattn-cli: the command line of the client library. docs/api.md describes it.

#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cli_commands.h"

namespace adaattn::client {
namespace {

constexpr char kExitCodes[] =
    "Exit codes: 0 done; 1 the server refused or answered wrongly; 2 arguments or files that make\n"
    "no sense; 3 the server could not be reached in time; 4 a replay outside its limits.\n";

std::string Usage(const std::vector<Command>& commands) {
  std::string usage = "usage: adaattn-cli COMMAND [--flag=value ...]\n\n";
  for (const Command& command : commands) {
    absl::StrAppendFormat(&usage, "  %-16s %s\n", absl::StrCat(command.name, " ", command.usage),
                          command.help);
  }
  return absl::StrCat(usage, "\n`adaattn-cli COMMAND --help` lists the flags.\n", kExitCodes);
}

int Run(const Command& command, const std::vector<std::string>& arguments) {
  std::vector<Flag> flags = CommonFlags();
  flags.insert(flags.end(), command.flags.begin(), command.flags.end());
  flags.push_back({"help", Flag::Type::kBool, "false", "print this"});
  const absl::StatusOr<Args> args = Args::Parse(arguments, flags);
  if (!args.ok()) return UsageError(args.status());
  if (args->Bool("help")) {
    std::printf("usage: adaattn-cli %s %s[--flag=value ...]\n%s.\n\n%s\n%s", command.name.c_str(),
                command.usage.empty() ? "" : absl::StrCat(command.usage, " ").c_str(),
                command.help.c_str(), FlagHelp(flags).c_str(), kExitCodes);
    return kExitOk;
  }
  const absl::StatusOr<int> exit_code = command.run(*args);
  if (exit_code.ok()) return *exit_code;
  std::fprintf(stderr, "%s\n", exit_code.status().ToString().c_str());
  return ExitCodeOf(exit_code.status());
}

int Main(int argc, char** argv) {
  const std::vector<Command> commands = {InfoCommand(),   SessionsCommand(), ProfileCommand(),
                                         ReplayCommand(), BenchCommand(),    DemoCommand()};
  const std::string name = argc > 1 ? argv[1] : "";
  for (const Command& command : commands) {
    if (command.name == name) return Run(command, std::vector<std::string>(argv + 2, argv + argc));
  }
  const bool asked = name == "help" || name == "--help" || name == "-h";
  std::fputs(Usage(commands).c_str(), asked ? stdout : stderr);
  return asked ? kExitOk : kExitUsage;
}

}  // namespace
}  // namespace adaattn::client

int main(int argc, char** argv) { return adaattn::client::Main(argc, argv); }

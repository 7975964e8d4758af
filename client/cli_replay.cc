#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "client/cli_commands.h"
#include "client/cli_progress.h"
#include "client/cli_report.h"
#include "client/replay.h"
#include "client/trace.h"

namespace adaattn::client {
namespace {

// "/a/b.safetensors" -> "b".
std::string TraceName(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string file = slash == std::string::npos ? path : path.substr(slash + 1);
  return file.substr(0, file.find('.') == 0 ? std::string::npos : file.rfind(".safetensors"));
}

absl::StatusOr<std::vector<ReplayConfig>> Configs(const Args& args) {
  if (absl::Status status = CheckRange(args, "concurrency", 1, 1024); !status.ok()) return status;
  if (absl::Status status = CheckRange(args, "rows", 0, 1e9); !status.ok()) return status;
  std::vector<ReplayConfig> configs;
  const std::vector<std::string> modes = absl::StrSplit(args.String("mode"), ',');
  for (const std::string& mode : modes) {
    absl::StatusOr<AttendChoice> choice = ParseAttendFlags(args, mode);
    if (!choice.ok()) return choice.status();
    ReplayConfig config;
    config.name = mode == "default" || mode.empty()
                      ? PageFormatName(choice->page_format)
                      : absl::StrCat(mode, "-", PageFormatName(choice->page_format));
    config.page_format = choice->page_format;
    config.element_type = choice->element_type;
    config.stored_bits = choice->stored_bits;
    config.exact_tier = choice->exact_tier;
    config.options = choice->options;
    config.concurrency = static_cast<int32_t>(args.Int("concurrency"));
    config.max_rows = static_cast<int32_t>(args.Int("rows"));
    configs.push_back(std::move(config));
  }
  return configs;
}

// Says on stderr which replays exceed a limit; 0 = no limit.
int CheckLimits(const Args& args, const std::vector<ReplayReport>& reports) {
  const double max_error = args.Double("max-error");
  const double max_fraction = args.Double("max-fraction");
  int exit_code = kExitOk;
  for (const ReplayReport& report : reports) {
    if (max_error > 0 && !(report.relative_error_mean <= max_error)) {
      std::fprintf(stderr, "%s: mean relative error %.4g above --max-error %.4g\n",
                   report.mode.c_str(), report.relative_error_mean, max_error);
      exit_code = kExitLimit;
    }
    if (max_fraction > 0 && !(report.bytes_fraction_steps <= max_fraction)) {
      std::fprintf(stderr, "%s: %.4g of BF16's bytes, above --max-fraction %.4g\n",
                   report.mode.c_str(), report.bytes_fraction_steps, max_fraction);
      exit_code = kExitLimit;
    }
  }
  return exit_code;
}

absl::StatusOr<int> RunReplay(const Args& args) {
  if (args.positional().size() != 1) {
    return UsageError(absl::InvalidArgumentError("replay: needs one trace file"));
  }
  const std::string& path = args.positional()[0];
  absl::StatusOr<std::vector<ReplayConfig>> configs = Configs(args);
  if (!configs.ok()) return UsageError(configs.status());
  const absl::StatusOr<Trace> trace = LoadTrace(path);
  if (!trace.ok()) return UsageError(trace.status());
  auto client = Connect(args);
  if (!client.ok()) return UsageError(client.status());
  std::vector<ReplayReport> reports;
  for (const ReplayConfig& config : *configs) {
    Progress progress(config.name, NumReplaySteps(*trace, config));
    absl::StatusOr<ReplayReport> report =
        Replay(client->get(), *trace, TraceName(path), config, [&] { progress.Advance(); });
    if (!report.ok()) return report.status();
    reports.push_back(*std::move(report));
  }
  std::fputs(PrintedReplays(reports, args.Bool("json")).c_str(), stdout);
  return CheckLimits(args, reports);
}

}  // namespace

Command ReplayCommand() {
  Command command{"replay", "TRACE",
                  "replay a captured trace and compare with the expected answers", AttendFlags(),
                  RunReplay};
  command.flags.push_back({"mode", Flag::Type::kString, "default",
                           "comma-separated, one session each: exact, full_depth, statistical, "
                           "deterministic, static"});
  command.flags.push_back(
      {"concurrency", Flag::Type::kInt, "1", "sessions that replay the trace at the same time"});
  command.flags.push_back({"rows", Flag::Type::kInt, "0", "captured rows to replay; 0 = all"});
  command.flags.push_back({"max-error", Flag::Type::kDouble, "0",
                           "exit with 4 when the mean relative error is above; 0 = no limit"});
  command.flags.push_back({"max-fraction", Flag::Type::kDouble, "0",
                           "exit with 4 when the mean share of BF16's bytes is above; 0 = no "
                           "limit"});
  return command;
}

}  // namespace adaattn::client

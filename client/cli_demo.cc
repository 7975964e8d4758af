#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cli_commands.h"
#include "client/cli_progress.h"
#include "client/cli_report.h"
#include "client/replay.h"
#include "client/trace.h"

namespace adaattn::client {
namespace {

// What a replay must reach: mean relative error and mean share of BF16's bytes; 0 = no limit.
struct Limit {
  double error = 0;
  double fraction = 0;
};

struct DemoTrace {
  const char* name;
  Limit threshold, two_stage, fine_threshold;
};

constexpr Limit kDenseBf16Limit = {0.008, 0};
constexpr DemoTrace kTraces[] = {
    {"qwen25-coder-1.5b-layer14-8k", {0.032, 0.180}, {0.032, 0.163}, {0.012, 0.236}},
    {"smollm2-135m-layer15-8k", {0.025, 0.177}, {0.025, 0.152}, {0.010, 0.236}},
};

struct DemoRun {
  ReplayConfig config;
  Limit limit;
};

std::vector<DemoRun> Runs(const DemoTrace& trace, int32_t head_dim, int32_t concurrency) {
  const auto make = [concurrency](const char* name, PageFormat format) {
    ReplayConfig config;
    config.name = name;
    config.page_format = format;
    config.concurrency = concurrency;
    return config;
  };
  const auto ladder = [&make](const char* name, float theta, int32_t coarse_rank) {
    ReplayConfig config = make(name, PageFormat::kProgressive);
    config.options.mode = Mode::kStatistical;
    config.options.policy = Policy::kThreshold;
    config.options.theta = theta;
    config.options.coarse_rank = coarse_rank;
    config.options.coarse_z = 2;
    return config;
  };
  ReplayConfig bf16 = make("dense-bf16", PageFormat::kBf16);
  ReplayConfig fp8 = make("dense-fp8", PageFormat::kF8E4m3);
  bf16.options.mode = fp8.options.mode = Mode::kExact;
  const auto aiming = [&make](const char* name, Policy policy) {
    ReplayConfig config = make(name, PageFormat::kProgressive);
    config.options.mode = Mode::kStatistical;
    config.options.policy = policy;
    return config;
  };
  return {
      {bf16, kDenseBf16Limit},
      {fp8, {}},
      {ladder("threshold", 0.004f, 0), trace.threshold},
      {ladder("threshold-two-stage", 0.004f, head_dim / 2), trace.two_stage},
      {ladder("threshold", 0.0005f, 0), trace.fine_threshold},
      {aiming("budget", Policy::kBudget), {}},
      {aiming("feedback", Policy::kFeedback), {}},
  };
}

// What is wrong with `report`, or "".
std::string Violation(const ReplayReport& report, const Limit& limit) {
  std::string problem;
  if (limit.error > 0 && !(report.relative_error_mean <= limit.error)) {
    absl::StrAppendFormat(&problem, "%s, %s, theta %g: mean relative error %.4g, at most %.4g\n",
                          report.trace, report.mode, report.theta, report.relative_error_mean,
                          limit.error);
  }
  if (limit.fraction > 0 && !(report.bytes_fraction_steps <= limit.fraction)) {
    absl::StrAppendFormat(&problem, "%s, %s, theta %g: %.4g of BF16's bytes, at most %.4g\n",
                          report.trace, report.mode, report.theta, report.bytes_fraction_steps,
                          limit.fraction);
  }
  return problem;
}

absl::Status WriteReport(const std::string& path, const std::vector<ReplayReport>& reports) {
  nlohmann::ordered_json runs = nlohmann::ordered_json::array();
  for (const ReplayReport& report : reports) runs.push_back(ToReportJson(report));
  std::ofstream file(path);
  file << nlohmann::ordered_json({{"runs", runs}}).dump(2) << "\n";
  file.close();
  if (file.good()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(path, ": cannot be written"));
}

absl::StatusOr<int> RunDemo(const Args& args) {
  if (absl::Status status = CheckRange(args, "concurrency", 1, 1024); !status.ok()) {
    return UsageError(status);
  }
  auto client = Connect(args);
  if (!client.ok()) return UsageError(client.status());
  std::vector<ReplayReport> reports;
  std::string problems;
  for (const DemoTrace& demo : kTraces) {
    const absl::StatusOr<Trace> trace =
        LoadTrace(absl::StrCat(args.String("traces"), "/", demo.name, ".safetensors"));
    if (!trace.ok()) return UsageError(trace.status());
    for (const DemoRun& run :
         Runs(demo, trace->shape.head_dim, static_cast<int32_t>(args.Int("concurrency")))) {
      Progress progress(absl::StrCat(demo.name, " ", run.config.name),
                        NumReplaySteps(*trace, run.config));
      absl::StatusOr<ReplayReport> report =
          Replay(client->get(), *trace, demo.name, run.config, [&] { progress.Advance(); });
      if (!report.ok()) {
        return absl::Status(report.status().code(), absl::StrCat(demo.name, ", ", run.config.name,
                                                                 ": ", report.status().message()));
      }
      absl::StrAppend(&problems, Violation(*report, run.limit));
      reports.push_back(*std::move(report));
    }
  }
  std::fputs(PrintedReplays(reports, args.Bool("json")).c_str(), stdout);
  if (!args.String("report").empty()) {
    if (absl::Status status = WriteReport(args.String("report"), reports); !status.ok()) {
      return status;
    }
  }
  std::fputs(problems.c_str(), stderr);
  return problems.empty() ? kExitOk : kExitLimit;
}

}  // namespace

Command DemoCommand() {
  return {"demo",
          "",
          "replay both traces of tests/data in every page format and policy, and judge the results",
          {{"traces", Flag::Type::kString, "tests/data", "folder of the traces"},
           {"concurrency", Flag::Type::kInt, "4", "sessions that replay a trace at the same time"},
           {"report", Flag::Type::kString, "", "where to write the runs as JSON"}},
          RunDemo};
}

}  // namespace adaattn::client

#include <cmath>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/cli_commands.h"
#include "client/cli_report.h"

namespace adaattn::client {
namespace {

// The value whose name is `text`, of those below `count`.
template <typename Enum>
absl::StatusOr<Enum> ParseEnum(const std::string& flag, const std::string& text, int count,
                               const char* (*name)(Enum)) {
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) {
    const auto value = static_cast<Enum>(i);
    if (text == name(value)) return value;
    names.emplace_back(name(value));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("--", flag, " \"", text, "\": must be one of ", absl::StrJoin(names, ", ")));
}

absl::StatusOr<int> RunInfo(const Args& args) {
  auto client = Connect(args);
  if (!client.ok()) return UsageError(client.status());
  const auto info = (*client)->GetServerInfo();
  if (!info.ok()) return info.status();
  if (args.Bool("json")) {
    std::puts(ToJson(*info).dump(2).c_str());
  } else {
    std::fputs(FormatServerInfo(*info).c_str(), stdout);
  }
  return kExitOk;
}

absl::StatusOr<int> RunSessions(const Args& args) {
  auto client = Connect(args);
  if (!client.ok()) return UsageError(client.status());
  const auto sessions = (*client)->ListSessions();
  if (!sessions.ok()) return sessions.status();
  if (args.Bool("json")) {
    nlohmann::ordered_json list = nlohmann::ordered_json::array();
    for (const SessionSummary& session : *sessions) list.push_back(ToJson(session));
    std::puts(nlohmann::ordered_json({{"sessions", list}}).dump(2).c_str());
  } else {
    std::fputs(FormatSessions(*sessions).c_str(), stdout);
  }
  return kExitOk;
}

absl::StatusOr<int> RunProfile(const Args& args) {
  if (args.positional().size() != 1) {
    return UsageError(absl::InvalidArgumentError("profile: takes one NAME"));
  }
  const std::string& name = args.positional().front();
  auto client = Connect(args);
  if (!client.ok()) return UsageError(client.status());
  auto summary = (*client)->GetProfile(name);
  if (!summary.ok()) return summary.status();
  if (args.Bool("apply-audits")) {
    Profile next;
    next.name = next.extends = name;
    next.model = summary->model;
    next.error_factors = summary->audited_error_factors;
    const auto bytes = (*client)->UploadProfile(next);
    if (!bytes.ok()) return bytes.status();
    summary = (*client)->GetProfile(name);
    if (!summary.ok()) return summary.status();
  }
  if (args.Bool("json")) {
    std::puts(ToJson(*summary).dump(2).c_str());
  } else {
    std::fputs(FormatProfile(*summary).c_str(), stdout);
  }
  return kExitOk;
}

}  // namespace

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitOk;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kDeadlineExceeded:
      return kExitUnreachable;
    default:
      return kExitFailed;
  }
}

int UsageError(const absl::Status& status) {
  std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  return kExitUsage;
}

std::vector<Flag> CommonFlags() {
  return {
      {"address", Flag::Type::kString, "127.0.0.1:7470", "server: host:port or unix:path"},
      {"deadline", Flag::Type::kDouble, "30", "seconds for one attempt of a call"},
      {"json", Flag::Type::kBool, "false", "print JSON"},
  };
}

absl::StatusOr<std::unique_ptr<Client>> Connect(const Args& args) {
  if (absl::Status status = CheckRange(args, "deadline", 0.001, 86400); !status.ok()) {
    return status;
  }
  ClientOptions options;
  options.address = args.String("address");
  options.deadline = absl::Seconds(args.Double("deadline"));
  return Client::Create(options);
}

absl::Status CheckRange(const Args& args, const std::string& flag, double least, double most) {
  const double value = args.Double(flag);
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--", flag, " ", args.String(flag), ": must be ", least, " to ", most));
}

std::vector<Flag> AttendFlags() {
  return {
      {"page-format", Flag::Type::kString, "progressive",
       "fp32, fp16, bf16, fp8_e4m3 or progressive"},
      {"element-type", Flag::Type::kString, "default",
       "progressive: pages not sealed yet, fp16 (the default) or bf16"},
      {"stored-bits", Flag::Type::kInt, "8", "progressive: bits kept of each code: 8, 6, 4"},
      {"exact-tier", Flag::Type::kString, "none",
       "progressive: originals kept for exact and deterministic, none, bf16_pages or host_pages"},
      {"policy", Flag::Type::kString, "default",
       "statistical: budget, feedback, threshold, entropy or learned"},
      {"theta", Flag::Type::kDouble, "0",
       "threshold, entropy: share below which V is skipped; 0 = .004, .03"},
      {"target", Flag::Type::kDouble, "0",
       "budget, feedback, learned, deterministic: target relative error; 0 = the server's (.05)"},
      {"coarse-rank", Flag::Type::kInt, "-1",
       "two-stage scan: channels read first; 0 = one stage, -1 = the server's default"},
      {"coarse-z", Flag::Type::kDouble, "-1",
       "two-stage scan: margin in standard deviations; -1 = the server's default"},
      {"key-bits", Flag::Type::kInt, "0", "static: 4, 6, 8"},
      {"value-bits", Flag::Type::kInt, "0", "static: 2, 4, 6, 8"},
      {"rank", Flag::Type::kInt, "0", "static: leading channels of K; 0 = all"},
  };
}

absl::StatusOr<AttendChoice> ParseAttendFlags(const Args& args, const std::string& mode) {
  AttendChoice choice;
  const auto format =
      ParseEnum<PageFormat>("page-format", args.String("page-format"), 6, PageFormatName);
  if (!format.ok()) return format.status();
  choice.page_format = *format;
  const auto type = ParseEnum<DType>("element-type", args.String("element-type"), 4, DTypeName);
  if (!type.ok()) return type.status();
  choice.element_type = *type;
  const auto tier = ParseEnum<ExactTier>("exact-tier", args.String("exact-tier"), 3, ExactTierName);
  if (!tier.ok()) return tier.status();
  choice.exact_tier = *tier;
  const auto parsed_mode = ParseEnum<Mode>("mode", mode.empty() ? "default" : mode, 6, ModeName);
  if (!parsed_mode.ok()) return parsed_mode.status();
  choice.options.mode = *parsed_mode;
  const auto policy = ParseEnum<Policy>("policy", args.String("policy"), 6, PolicyName);
  if (!policy.ok()) return policy.status();
  choice.options.policy = *policy;
  choice.stored_bits = choice.page_format == PageFormat::kProgressive
                           ? static_cast<int32_t>(args.Int("stored-bits"))
                           : 0;
  choice.options.theta = static_cast<float>(args.Double("theta"));
  choice.options.target_relative_error = static_cast<float>(args.Double("target"));
  if (args.Int("coarse-rank") >= 0) {
    choice.options.coarse_rank = static_cast<int32_t>(args.Int("coarse-rank"));
  }
  if (args.Double("coarse-z") >= 0) {
    choice.options.coarse_z = static_cast<float>(args.Double("coarse-z"));
  }
  choice.options.static_key_bits = static_cast<int32_t>(args.Int("key-bits"));
  choice.options.static_value_bits = static_cast<int32_t>(args.Int("value-bits"));
  choice.options.static_rank = static_cast<int32_t>(args.Int("rank"));
  return choice;
}

Command InfoCommand() { return {"info", "", "what the server is and can do", {}, RunInfo}; }

Command ProfileCommand() {
  return {"profile",
          "NAME",
          "what a profile holds, and what audits say of its error factors",
          {{"apply-audits", Flag::Type::kBool, "false",
            "upload it again with the error factors that audits give"}},
          RunProfile};
}

Command SessionsCommand() { return {"sessions", "", "the caller's own sessions", {}, RunSessions}; }

}  // namespace adaattn::client

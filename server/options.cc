#include "server/options.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"

namespace adaattn {
namespace {

absl::Status BadValue(const Setting& setting, absl::string_view text, absl::string_view allowed) {
  return absl::InvalidArgumentError(
      absl::StrCat("setting ", setting.name, ": \"", text, "\" is not allowed; ", allowed));
}

std::string RangeText(const Setting& setting) {
  return std::isinf(setting.max) ? absl::StrCat("at least ", setting.min)
                                 : absl::StrCat("from ", setting.min, " to ", setting.max);
}

absl::Status CheckRange(const Setting& setting, absl::string_view text, double value,
                        absl::string_view what) {
  if (value >= setting.min && value <= setting.max) return absl::OkStatus();
  return BadValue(setting, text, absl::StrCat("it must be ", what, " ", RangeText(setting)));
}

// A whole number, with an optional KiB, MiB, GiB or TiB behind it.
bool ParseWhole(absl::string_view text, int64_t* value) {
  int shift = 0;
  for (const auto& [suffix, bits] :
       {std::pair<const char*, int>{"KiB", 10}, {"MiB", 20}, {"GiB", 30}, {"TiB", 40}}) {
    if (absl::ConsumeSuffix(&text, suffix)) shift = bits;
  }
  if (!absl::SimpleAtoi(text, value)) return false;
  const int64_t scaled = int64_t{1} << shift;
  if (*value > std::numeric_limits<int64_t>::max() / scaled || *value < 0) return *value < 0;
  *value *= scaled;
  return true;
}

struct Applier {
  const Setting& setting;
  absl::string_view text;

  absl::Status operator()(std::string* target) const {
    const std::vector<std::string>& choices = setting.choices;
    if (!choices.empty() && std::find(choices.begin(), choices.end(), text) == choices.end()) {
      return BadValue(setting, text, absl::StrCat("choose from ", absl::StrJoin(choices, ", ")));
    }
    *target = std::string(text);
    return absl::OkStatus();
  }
  absl::Status operator()(bool* target) const {
    if (!absl::SimpleAtob(text, target)) return BadValue(setting, text, "it is true or false");
    return absl::OkStatus();
  }
  template <typename Whole>
  absl::Status ApplyWhole(Whole* target) const {
    int64_t value = 0;
    if (!ParseWhole(text, &value)) {
      return BadValue(setting, text,
                      absl::StrCat("it must be a whole number (KiB, MiB, GiB may follow) ",
                                   RangeText(setting)));
    }
    absl::Status status = CheckRange(setting, text, static_cast<double>(value), "a whole number");
    if (status.ok()) *target = static_cast<Whole>(value);
    return status;
  }
  absl::Status operator()(int32_t* target) const { return ApplyWhole(target); }
  absl::Status operator()(int64_t* target) const { return ApplyWhole(target); }
  template <typename Real>
  absl::Status ApplyReal(Real* target) const {
    double value = 0;
    if (!absl::SimpleAtod(text, &value) || !std::isfinite(value)) {
      return BadValue(setting, text, absl::StrCat("it must be a number ", RangeText(setting)));
    }
    absl::Status status = CheckRange(setting, text, value, "a number");
    if (status.ok()) *target = static_cast<Real>(value);
    return status;
  }
  absl::Status operator()(double* target) const { return ApplyReal(target); }
  absl::Status operator()(float* target) const { return ApplyReal(target); }
  absl::Status operator()(absl::Duration* target) const {
    absl::Duration value;
    if (!absl::ParseDuration(text, &value)) {
      return BadValue(setting, text, "it must be a duration such as 250ms, 10s or 1h30m");
    }
    absl::Status status =
        CheckRange(setting, text, absl::ToDoubleSeconds(value), "a duration of seconds");
    if (status.ok()) *target = value;
    return status;
  }
};

const Setting* FindSetting(const std::vector<Setting>& table, absl::string_view name) {
  const std::string dashed = absl::StrReplaceAll(name, {{"_", "-"}});
  const auto found = std::find_if(table.begin(), table.end(), [&dashed](const Setting& setting) {
    return setting.name == dashed;
  });
  return found == table.end() ? nullptr : &*found;
}

absl::StatusOr<std::string> ReadConfigFile(const std::string& path) {
  const std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  if (!file || text.fail()) {
    return absl::NotFoundError(absl::StrCat("setting config: cannot read \"", path, "\""));
  }
  return text.str();
}

// One flag of the command line.
struct Flag {
  std::string name, value;
};

absl::StatusOr<std::vector<Flag>> SplitFlags(absl::Span<const std::string> args,
                                             const std::vector<Setting>& table) {
  std::vector<Flag> flags;
  for (size_t i = 0; i < args.size(); ++i) {
    absl::string_view arg = args[i];
    if (!absl::ConsumePrefix(&arg, "--")) {
      return absl::InvalidArgumentError(absl::StrCat("\"", args[i], "\" is not a flag"));
    }
    const size_t equals = arg.find('=');
    Flag flag{std::string(arg.substr(0, equals)), ""};
    const Setting* setting = FindSetting(table, flag.name);
    if (equals != absl::string_view::npos) {
      flag.value = std::string(arg.substr(equals + 1));
    } else if (setting != nullptr && std::holds_alternative<bool*>(setting->target)) {
      flag.value = "true";
    } else if (setting != nullptr || flag.name == "config") {
      if (++i == args.size()) {
        return absl::InvalidArgumentError(absl::StrCat("--", flag.name, " needs a value"));
      }
      flag.value = args[i];
    }
    flags.push_back(std::move(flag));
  }
  return flags;
}

bool FindAction(absl::string_view name, Action* action) {
  for (const auto& [flag, meaning] : {std::pair<const char*, Action>{"help", Action::kHelp},
                                      {"version", Action::kVersion},
                                      {"print-metrics", Action::kPrintMetrics},
                                      {"print-config", Action::kPrintConfig}}) {
    if (name != flag) continue;
    *action = meaning;
    return true;
  }
  return false;
}

}  // namespace

std::string Setting::ValueText() const {
  struct Printer {
    std::string operator()(const std::string* value) const { return *value; }
    std::string operator()(const bool* value) const { return *value ? "true" : "false"; }
    std::string operator()(const int32_t* value) const { return absl::StrCat(*value); }
    std::string operator()(const int64_t* value) const { return absl::StrCat(*value); }
    std::string operator()(const double* value) const { return absl::StrCat(*value); }
    std::string operator()(const float* value) const { return absl::StrCat(*value); }
    std::string operator()(const absl::Duration* value) const {
      return absl::FormatDuration(*value);
    }
  };
  return std::visit(Printer(), target);
}

absl::Status ApplySetting(const Setting& setting, absl::string_view text) {
  return std::visit(Applier{setting, text}, setting.target);
}

absl::Status ApplyConfigJson(absl::string_view json, ServerOptions* options) {
  const auto parsed = nlohmann::json::parse(json.begin(), json.end(), nullptr,
                                            /*allow_exceptions=*/false, /*ignore_comments=*/true);
  if (!parsed.is_object()) {
    return absl::InvalidArgumentError("setting config: the file is not a JSON object");
  }
  const std::vector<Setting> table = SettingTable(options);
  for (const auto& [name, value] : parsed.items()) {
    const Setting* setting = FindSetting(table, name);
    if (setting == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("config file: unknown setting \"", name, "\""));
    }
    if (!value.is_string() && !value.is_number() && !value.is_boolean()) {
      return BadValue(*setting, value.dump(), "it must be a string, a number or a boolean");
    }
    absl::Status status =
        ApplySetting(*setting, value.is_string() ? value.get<std::string>() : value.dump());
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

std::string OptionsJson(ServerOptions options) {
  nlohmann::ordered_json all = nlohmann::ordered_json::object();
  for (const Setting& setting : SettingTable(&options)) {
    const std::string text = setting.ValueText();
    const bool quoted = std::holds_alternative<std::string*>(setting.target) ||
                        std::holds_alternative<absl::Duration*>(setting.target);
    if (quoted) {
      all[setting.name] = text;
    } else {
      all[setting.name] = nlohmann::ordered_json::parse(text);
    }
  }
  return all.dump(2) + "\n";
}

absl::StatusOr<CommandLine> ParseCommandLine(absl::Span<const std::string> args) {
  CommandLine line;
  const std::vector<Setting> table = SettingTable(&line.options);
  absl::StatusOr<std::vector<Flag>> flags = SplitFlags(args, table);
  if (!flags.ok()) return flags.status();
  for (const Flag& flag : *flags) {
    if (flag.name != "config") continue;
    absl::StatusOr<std::string> text = ReadConfigFile(flag.value);
    if (!text.ok()) return text.status();
    absl::Status status = ApplyConfigJson(*text, &line.options);
    if (!status.ok()) return status;
  }
  for (const Flag& flag : *flags) {
    if (flag.name == "config" || FindAction(flag.name, &line.action)) continue;
    const Setting* setting = FindSetting(table, flag.name);
    if (setting == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("unknown flag --", flag.name, "; --help lists them"));
    }
    absl::Status status = ApplySetting(*setting, flag.value);
    if (!status.ok()) return status;
  }
  absl::Status status = ValidateOptions(line.options);
  if (!status.ok()) return status;
  return line;
}

std::string HelpText() {
  ServerOptions defaults;
  std::string text =
      "adaattn-server: keeps KV caches and answers attention over gRPC.\n\n"
      "Every setting is a flag (--name=value) and a key of the JSON object in the file of\n"
      "--config; the flag wins. Also: --help, --version, --print-config (the settings in use, as\n"
      "a config file), --print-metrics (every metric exported, as JSON).\n\n";
  for (const Setting& setting : SettingTable(&defaults)) {
    absl::StrAppend(&text, "  --", setting.name, "=", setting.ValueText(), "\n      ",
                    setting.help);
    if (!setting.choices.empty()) {
      absl::StrAppend(&text, " One of ", absl::StrJoin(setting.choices, ", "), ".");
    }
    absl::StrAppend(&text, "\n");
  }
  return text;
}

}  // namespace adaattn

#include "client/cli_args.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"

namespace adaattn::client {
namespace {

absl::Status CheckValue(const Flag& flag, const std::string& value) {
  int64_t integer = 0;
  double number = 0;
  bool truth = false;
  switch (flag.type) {
    case Flag::Type::kString:
      return absl::OkStatus();
    case Flag::Type::kInt:
      if (absl::SimpleAtoi(value, &integer)) return absl::OkStatus();
      return absl::InvalidArgumentError(
          absl::StrCat("--", flag.name, " \"", value, "\": must be an integer"));
    case Flag::Type::kDouble:
      if (absl::SimpleAtod(value, &number)) return absl::OkStatus();
      return absl::InvalidArgumentError(
          absl::StrCat("--", flag.name, " \"", value, "\": must be a number"));
    case Flag::Type::kBool:
      if (absl::SimpleAtob(value, &truth)) return absl::OkStatus();
      return absl::InvalidArgumentError(
          absl::StrCat("--", flag.name, " \"", value, "\": must be true or false"));
  }
  return absl::InternalError("a flag of no type");
}

}  // namespace

absl::StatusOr<Args> Args::Parse(absl::Span<const std::string> arguments,
                                 absl::Span<const Flag> flags) {
  Args args;
  for (const Flag& flag : flags) args.values_[flag.name] = flag.default_value;
  bool flags_over = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    absl::string_view text = arguments[i];
    if (flags_over || !absl::ConsumePrefix(&text, "--")) {
      args.positional_.push_back(arguments[i]);
      continue;
    }
    if (text.empty()) {
      flags_over = true;
      continue;
    }
    const size_t equals = text.find('=');
    const std::string name(text.substr(0, equals));
    const auto flag =
        std::find_if(flags.begin(), flags.end(), [&](const Flag& f) { return f.name == name; });
    if (flag == flags.end()) {
      return absl::InvalidArgumentError(absl::StrCat("--", name, ": no such flag"));
    }
    std::string value;
    if (equals != absl::string_view::npos) {
      value = std::string(text.substr(equals + 1));
    } else if (flag->type == Flag::Type::kBool) {
      value = "true";
    } else if (i + 1 < arguments.size()) {
      value = arguments[++i];
    } else {
      return absl::InvalidArgumentError(absl::StrCat("--", name, ": needs a value"));
    }
    if (absl::Status status = CheckValue(*flag, value); !status.ok()) return status;
    args.values_[name] = args.given_[name] = value;
  }
  return args;
}

const std::string& Args::String(const std::string& name) const { return values_.at(name); }

int64_t Args::Int(const std::string& name) const {
  int64_t value = 0;
  (void)absl::SimpleAtoi(values_.at(name), &value);  // checked when parsed
  return value;
}

double Args::Double(const std::string& name) const {
  double value = 0;
  (void)absl::SimpleAtod(values_.at(name), &value);
  return value;
}

bool Args::Bool(const std::string& name) const {
  bool value = false;
  (void)absl::SimpleAtob(values_.at(name), &value);
  return value;
}

std::string FlagHelp(absl::Span<const Flag> flags) {
  std::string help;
  for (const Flag& flag : flags) {
    absl::StrAppend(&help, absl::StrFormat("  --%-18s %s", flag.name, flag.help));
    if (flag.type != Flag::Type::kBool && !flag.default_value.empty()) {
      absl::StrAppend(&help, " [", flag.default_value, "]");
    }
    absl::StrAppend(&help, "\n");
  }
  return help;
}

}  // namespace adaattn::client

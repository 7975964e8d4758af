#ifndef ADAATTN_CLIENT_CLI_ARGS_H_
#define ADAATTN_CLIENT_CLI_ARGS_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace adaattn::client {

// One `--name=value` of a command.
struct Flag {
  enum class Type { kString, kInt, kDouble, kBool };

  std::string name;
  Type type = Type::kString;
  std::string default_value;  // kBool: "false"
  std::string help;
};

// The arguments of one command, checked against its flags.
class Args {
 public:
  // Takes `--name=value`, `--name value`, `--flag` for bools, and positional arguments; `--` ends
  // the flags. Errors: kInvalidArgument naming the argument, what it holds and what it may hold.
  static absl::StatusOr<Args> Parse(absl::Span<const std::string> arguments,
                                    absl::Span<const Flag> flags);

  // The flag's value, or its default. Requires: a flag of that name and type.
  const std::string& String(const std::string& name) const;
  int64_t Int(const std::string& name) const;
  double Double(const std::string& name) const;
  bool Bool(const std::string& name) const;
  // Whether the flag was given.
  bool Has(const std::string& name) const { return given_.count(name) > 0; }

  const std::vector<std::string>& positional() const { return positional_; }

 private:
  std::map<std::string, std::string> values_;
  std::map<std::string, std::string> given_;
  std::vector<std::string> positional_;
};

// One line per flag: name, help, default.
std::string FlagHelp(absl::Span<const Flag> flags);

}  // namespace adaattn::client

#endif  // ADAATTN_CLIENT_CLI_ARGS_H_

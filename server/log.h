#ifndef ADAATTN_SERVER_LOG_H_
#define ADAATTN_SERVER_LOG_H_

// One JSON object per line on stderr: ts (RFC 3339, UTC), level, msg, then the fields of the call.
// Threads: any; lines never mix.

#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <variant>

#include "absl/strings/string_view.h"

namespace adaattn {

enum class LogLevel : uint8_t { kDebug = 0, kInfo = 1, kWarning = 2, kError = 3 };
const char* LogLevelName(LogLevel level);  // "debug", "info", "warning", "error"

class LogField {
 public:
  LogField(absl::string_view name, absl::string_view text) : name(name), value(text) {}
  LogField(absl::string_view name, const char* text) : LogField(name, absl::string_view(text)) {}
  LogField(absl::string_view name, const std::string& text)
      : LogField(name, absl::string_view(text)) {}
  LogField(absl::string_view name, double number) : name(name), value(number) {}
  LogField(absl::string_view name, bool flag) : name(name), value(flag) {}
  template <typename T, typename = std::enable_if_t<std::is_integral_v<T>>>
  LogField(absl::string_view name, T number) : name(name), value(static_cast<int64_t>(number)) {}

  absl::string_view name;
  std::variant<absl::string_view, int64_t, double, bool> value;
};

// Lines below `level` are dropped; kInfo at start.
void SetLogLevel(LogLevel level);
bool LogEnabled(LogLevel level);

void Log(LogLevel level, absl::string_view message, std::initializer_list<LogField> fields = {});

// The line that Log writes, without the newline. `ts` is its first field's value.
std::string FormatLogLine(absl::string_view ts, LogLevel level, absl::string_view message,
                          std::initializer_list<LogField> fields);

// What gRPC and protobuf have to say goes through Log too: their errors as warnings, the rest as
// debug lines (a client can cause any of them at will).
void RedirectLibraryLogs();

}  // namespace adaattn

#endif  // ADAATTN_SERVER_LOG_H_

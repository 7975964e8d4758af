#include "server/log.h"

#include <google/protobuf/stubs/logging.h>
#include <grpc/support/log.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <memory>
#include <nlohmann/json.hpp>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace adaattn {
namespace {

std::atomic<LogLevel> current_level{LogLevel::kInfo};

spdlog::logger& Logger() {
  // Never destroyed: threads may log until the process ends.
  static spdlog::logger* const logger = [] {
    auto* made = new spdlog::logger("adaattn", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_pattern("%v");
    made->set_level(spdlog::level::trace);
    return made;
  }();
  return *logger;
}

void LogGrpc(gpr_log_func_args* args) {
  const bool error = args->severity == GPR_LOG_SEVERITY_ERROR;
  Log(error ? LogLevel::kWarning : LogLevel::kDebug, args->message,
      {{"library", "grpc"}, {"file", args->file}, {"line", args->line}});
}

void LogProtobuf(google::protobuf::LogLevel, const char* file, int line,
                 const std::string& message) {
  Log(LogLevel::kDebug, message, {{"library", "protobuf"}, {"file", file}, {"line", line}});
}

}  // namespace

const char* LogLevelName(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return "debug";
    case LogLevel::kInfo:
      return "info";
    case LogLevel::kWarning:
      return "warning";
    case LogLevel::kError:
      return "error";
  }
  return "unknown";
}

void SetLogLevel(LogLevel level) {
  current_level.store(level, std::memory_order_relaxed);
  gpr_set_log_verbosity(level == LogLevel::kDebug ? GPR_LOG_SEVERITY_INFO : GPR_LOG_SEVERITY_ERROR);
}

bool LogEnabled(LogLevel level) { return level >= current_level.load(std::memory_order_relaxed); }

std::string FormatLogLine(absl::string_view ts, LogLevel level, absl::string_view message,
                          std::initializer_list<LogField> fields) {
  nlohmann::ordered_json line;
  line["ts"] = std::string(ts);
  line["level"] = LogLevelName(level);
  line["msg"] = std::string(message);
  for (const LogField& field : fields) {
    nlohmann::ordered_json& slot = line[std::string(field.name)];
    if (const auto* text = std::get_if<absl::string_view>(&field.value)) {
      slot = std::string(*text);
    } else if (const auto* number = std::get_if<int64_t>(&field.value)) {
      slot = *number;
    } else if (const auto* real = std::get_if<double>(&field.value)) {
      slot = *real;
    } else {
      slot = std::get<bool>(field.value);
    }
  }
  // Clients choose some of these texts: broken UTF-8 is replaced, never thrown about.
  return line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

void Log(LogLevel level, absl::string_view message, std::initializer_list<LogField> fields) {
  if (!LogEnabled(level)) return;
  const std::string ts = absl::FormatTime("%Y-%m-%dT%H:%M:%E6SZ", absl::Now(), absl::UTCTimeZone());
  Logger().info(FormatLogLine(ts, level, message, fields));
}

void RedirectLibraryLogs() {
  gpr_set_log_function(&LogGrpc);
  google::protobuf::SetLogHandler(&LogProtobuf);
}

}  // namespace adaattn

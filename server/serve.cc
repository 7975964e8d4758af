#include "server/serve.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <fstream>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/log.h"
#include "server/server.h"

namespace adaattn {
namespace {

int signal_pipe[2] = {-1, -1};

// Only what a signal handler may: one byte, for main to find.
void OnSignal(int) {
  const int saved = errno;
  const char byte = 1;
  const ssize_t written = write(signal_pipe[1], &byte, 1);
  (void)written;
  errno = saved;
}

bool InstallSignalHandlers() {
  if (pipe2(signal_pipe, O_CLOEXEC | O_NONBLOCK) != 0) return false;
  struct sigaction action = {};
  action.sa_handler = &OnSignal;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  signal(SIGPIPE, SIG_IGN);
  return sigaction(SIGTERM, &action, nullptr) == 0 && sigaction(SIGINT, &action, nullptr) == 0;
}

// Whether a signal came within `timeout`; takes one.
bool WaitForSignal(absl::Duration timeout) {
  pollfd waiting = {signal_pipe[0], POLLIN, 0};
  const auto milliseconds = static_cast<int>(absl::ToInt64Milliseconds(timeout));
  char byte = 0;
  return poll(&waiting, 1, milliseconds) > 0 && read(signal_pipe[0], &byte, 1) == 1;
}

// Written beside and renamed, so that a reader sees all or nothing.
bool WritePortFile(const std::string& path, const ServerAddresses& addresses) {
  const std::string temporary = absl::StrCat(path, ".tmp");
  {
    std::ofstream file(temporary);
    file << addresses.ToJson() << "\n";
    if (!file.flush()) return false;
  }
  return std::rename(temporary.c_str(), path.c_str()) == 0;
}

LogLevel LevelOf(const std::string& name) {
  for (const LogLevel level : {LogLevel::kDebug, LogLevel::kWarning, LogLevel::kError}) {
    if (name == LogLevelName(level)) return level;
  }
  return LogLevel::kInfo;
}

}  // namespace

int Serve(const ServerOptions& options, std::unique_ptr<Backend> backend) {
  SetLogLevel(LevelOf(options.log_level));
  RedirectLibraryLogs();
  if (!InstallSignalHandlers()) {
    Log(LogLevel::kError, "cannot install signal handlers");
    return 1;
  }
  absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(options, std::move(backend));
  if (!server.ok()) {
    Log(LogLevel::kError, "cannot start", {{"status", server.status().ToString()}});
    return 1;
  }
  const ServerAddresses& addresses = (*server)->addresses();
  Log(LogLevel::kInfo, "serving",
      {{"grpc", addresses.grpc},
       {"unix", addresses.unix},
       {"metrics", addresses.metrics},
       {"admin", addresses.admin}});
  std::printf("%s\n", addresses.ToJson().c_str());
  std::fflush(stdout);
  if (!options.port_file.empty() && !WritePortFile(options.port_file, addresses)) {
    Log(LogLevel::kError, "setting port-file: cannot write", {{"path", options.port_file}});
    return 1;
  }
  while (!WaitForSignal(LiveHistory::kInterval) && !(*server)->device_lost()) {
    (*server)->SampleLive();
  }
  const bool lost = (*server)->device_lost();
  Log(LogLevel::kInfo, "draining",
      {{"pause", absl::FormatDuration(options.drain_pause)},
       {"deadline", absl::FormatDuration(options.drain_deadline)}});
  (*server)->StopAccepting();
  const bool hurried = lost || WaitForSignal(options.drain_pause);
  (*server)->Drain(hurried ? absl::Now() : absl::Now() + options.drain_deadline,
                   [] { return WaitForSignal(absl::ZeroDuration()); });
  Log(LogLevel::kInfo, "stopped");
  return lost ? 1 : 0;
}

}  // namespace adaattn

#include "server/process_stats.h"

#include <dirent.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace adaattn {
namespace {

std::string ReadFile(const char* path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

int64_t CountOpenFds() {
  DIR* dir = opendir("/proc/self/fd");
  if (dir == nullptr) return 0;
  int64_t count = -1;  // Without the one that reads the directory.
  while (const dirent* entry = readdir(dir)) {
    if (entry->d_name[0] != '.') ++count;
  }
  closedir(dir);
  return count;
}

// Seconds since 1970 at which the machine started.
double BootTime() {
  std::istringstream text(ReadFile("/proc/stat"));
  for (std::string line; std::getline(text, line);) {
    if (line.rfind("btime ", 0) == 0) return std::strtod(line.c_str() + 6, nullptr);
  }
  return 0;
}

}  // namespace

ProcessStats ReadProcessStats() {
  ProcessStats stats;
  // The second field is the program's name in parentheses and may hold anything.
  const std::string text = ReadFile("/proc/self/stat");
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return stats;
  std::istringstream words(text.substr(name_end + 1));
  std::vector<std::string> fields;  // fields[0] is field 3 of proc(5)
  for (std::string word; words >> word;) fields.push_back(word);
  if (fields.size() < 22) return stats;
  const auto number = [&fields](size_t field) {
    return static_cast<double>(std::strtoll(fields[field - 3].c_str(), nullptr, 10));
  };
  const auto ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
  stats.cpu_seconds = (number(14) + number(15)) / ticks;
  stats.threads = static_cast<int64_t>(number(20));
  static const double boot_time = BootTime();
  stats.start_time = boot_time + number(22) / ticks;
  stats.virtual_bytes = static_cast<int64_t>(number(23));
  stats.resident_bytes = static_cast<int64_t>(number(24)) * sysconf(_SC_PAGESIZE);
  stats.open_fds = CountOpenFds();
  return stats;
}

}  // namespace adaattn

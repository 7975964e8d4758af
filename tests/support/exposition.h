#ifndef ADAATTN_TESTS_SUPPORT_EXPOSITION_H_
#define ADAATTN_TESTS_SUPPORT_EXPOSITION_H_

#include <cstdlib>
#include <map>
#include <sstream>
#include <string>

namespace adaattn {

// The samples of a Prometheus text exposition: `name{label="value",...}` as written, to its value.
inline std::map<std::string, double> ParseExposition(const std::string& text) {
  std::map<std::string, double> samples;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const size_t space = line.rfind(' ');
    if (line.empty() || line[0] == '#' || space == std::string::npos) continue;
    samples[line.substr(0, space)] = std::strtod(line.c_str() + space + 1, nullptr);
  }
  return samples;
}

}  // namespace adaattn

#endif  // ADAATTN_TESTS_SUPPORT_EXPOSITION_H_

// adaattn-server: reads the command line; all the work is in Server and Serve.

#include <cstdio>
#include <string>
#include <vector>

#include "server/metric_table.h"
#include "server/options.h"
#include "server/serve.h"
#include "server/server.h"

namespace adaattn {
namespace {

int Main(const std::vector<std::string>& args) {
  absl::StatusOr<CommandLine> line = ParseCommandLine(args);
  if (!line.ok()) {
    std::fprintf(stderr, "adaattn-server: %s\n", std::string(line.status().message()).c_str());
    return 2;
  }
  switch (line->action) {
    case Action::kHelp:
      std::printf("%s", HelpText().c_str());
      return 0;
    case Action::kVersion: {
      const MetricsInfo info = BuildInfo();
      std::printf("adaattn-server %s (%s, %s)\n", info.version.c_str(), info.commit.c_str(),
                  info.compiler.c_str());
      return 0;
    }
    case Action::kPrintMetrics:
      std::printf("%s\n", MetricTableJson().c_str());
      return 0;
    case Action::kPrintConfig:
      std::printf("%s", OptionsJson(line->options).c_str());
      return 0;
    case Action::kServe:
      return Serve(line->options);
  }
  return 2;
}

}  // namespace
}  // namespace adaattn

int main(int argc, char** argv) {
  return adaattn::Main(std::vector<std::string>(argv + 1, argv + argc));
}

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "server/log.h"

namespace adaattn {
namespace {

TEST(LogTest, LinesAreJsonInAFixedOrder) {
  const std::string name = "value";
  EXPECT_EQ(FormatLogLine("2026-01-02T03:04:05.000006Z", LogLevel::kWarning, "it happened",
                          {{"text", name}, {"count", 3}, {"share", 0.5}, {"done", true}}),
            R"({"ts":"2026-01-02T03:04:05.000006Z","level":"warning","msg":"it happened",)"
            R"("text":"value","count":3,"share":0.5,"done":true})");
}

TEST(LogTest, TextsOfClientsCannotBreakALine) {
  const std::string nasty("quote\" newline\n broken\xff utf-8 \x01", 30);
  const std::string line = FormatLogLine("t", LogLevel::kInfo, nasty, {{"field", nasty}});
  EXPECT_EQ(line.find('\n'), std::string::npos);
  const auto parsed = nlohmann::json::parse(line);
  EXPECT_EQ(parsed["msg"].get<std::string>().substr(0, 14), "quote\" newline");
}

TEST(LogTest, LevelsBelowTheChosenOneAreOff) {
  SetLogLevel(LogLevel::kWarning);
  EXPECT_FALSE(LogEnabled(LogLevel::kInfo));
  EXPECT_TRUE(LogEnabled(LogLevel::kError));
  SetLogLevel(LogLevel::kInfo);
  EXPECT_TRUE(LogEnabled(LogLevel::kInfo));
}

}  // namespace
}  // namespace adaattn

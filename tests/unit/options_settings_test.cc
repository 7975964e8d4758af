#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "server/options.h"

namespace adaattn {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string MessageOf(const absl::StatusOr<CommandLine>& line) {
  return line.ok() ? "OK" : std::string(line.status().message());
}

class ConfigFile {
 public:
  explicit ConfigFile(const std::string& text) {
    static int count = 0;
    path_ = std::filesystem::temp_directory_path() /
            ("adaattn_options_" + std::to_string(getpid()) + "_" + std::to_string(++count));
    std::ofstream(path_) << text;
  }
  ~ConfigFile() { std::filesystem::remove(path_); }
  std::string flag() const { return "--config=" + path_.string(); }

 private:
  std::filesystem::path path_;
};

TEST(OptionsTest, DefaultsAreValidAndLimited) {
  ServerOptions defaults;
  EXPECT_TRUE(ValidateOptions(defaults).ok()) << ValidateOptions(defaults);
  std::set<std::string> names;
  for (const Setting& setting : SettingTable(&defaults)) {
    EXPECT_TRUE(names.insert(setting.name).second) << setting.name << " twice";
    EXPECT_TRUE(ApplySetting(setting, setting.ValueText()).ok())
        << setting.name << "=" << setting.ValueText() << ": "
        << ApplySetting(setting, setting.ValueText());
    const std::string name = setting.name;
    // 0 never means unlimited by accident: a limit either refuses 0 or says what it means.
    if (name.rfind("max-", 0) == 0 && setting.min <= 0) {
      EXPECT_THAT(setting.help, HasSubstr("0 =")) << name;
    }
  }
}

TEST(OptionsTest, FlagsSetFieldsInEverySpelling) {
  auto line = ParseCommandLine({"--listen=127.0.0.1:0", "--pool-bytes", "2GiB", "--max_sessions=7",
                                "--allow-plaintext", "--drain-pause=250ms", "--audit-share=0.25"});
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(line->action, Action::kServe);
  EXPECT_EQ(line->options.listen, "127.0.0.1:0");
  EXPECT_EQ(line->options.device.pool_bytes, int64_t{2} << 30);
  EXPECT_EQ(line->options.sessions.max_sessions, 7);
  EXPECT_TRUE(line->options.allow_plaintext);
  EXPECT_EQ(line->options.drain_pause, absl::Milliseconds(250));
  EXPECT_EQ(line->options.engine.audit_share, 0.25);
}

TEST(OptionsTest, TheFlagWinsOverTheFile) {
  const ConfigFile file(R"({"max-sessions": 5, "threads": 3, "audit_share": 0.5})");
  auto line = ParseCommandLine({"--max-sessions=9", file.flag()});
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(line->options.sessions.max_sessions, 9);
  EXPECT_EQ(line->options.device.num_threads, 3);
  EXPECT_EQ(line->options.engine.audit_share, 0.5);
}

TEST(OptionsTest, ErrorsNameSettingValueAndRange) {
  EXPECT_THAT(MessageOf(ParseCommandLine({"--max-sessions=0"})),
              AllOf(HasSubstr("max-sessions"), HasSubstr("\"0\""), HasSubstr("from 1")));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--max-sessions=many"})),
              AllOf(HasSubstr("max-sessions"), HasSubstr("\"many\"")));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--audit-share=1.5"})),
              AllOf(HasSubstr("audit-share"), HasSubstr("1.5"), HasSubstr("from 0 to 1")));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--audit-share=nan"})), HasSubstr("audit-share"));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--batch-delay=5"})),
              AllOf(HasSubstr("batch-delay"), HasSubstr("duration")));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--batch-delay=inf"})), HasSubstr("batch-delay"));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--backend=tpu"})),
              AllOf(HasSubstr("backend"), HasSubstr("auto, cpu, cuda")));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--allow-plaintext=perhaps"})),
              HasSubstr("allow-plaintext"));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--pool-bytes=9000000000GiB"})), HasSubstr("pool-bytes"));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--fit-tokens=100"})),
              AllOf(HasSubstr("fit-tokens"), HasSubstr("multiple of 64")));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--default-policy=best"})),
              AllOf(HasSubstr("default-policy"), HasSubstr("entropy, learned")));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--default-policy=learned"})), HasSubstr("policy-file"));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--default-static-key-bits=5"})),
              AllOf(HasSubstr("default-static-key-bits"), HasSubstr("odd")));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--default-target-relative-error=0"})),
              HasSubstr("default-target-relative-error"));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--default-max-relative-error=0.01"})),
              AllOf(HasSubstr("default-target-relative-error"), HasSubstr("must not exceed")));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--no-such-thing=1"})), HasSubstr("--no-such-thing"));
  EXPECT_THAT(MessageOf(ParseCommandLine({"serve"})), HasSubstr("\"serve\" is not a flag"));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--listen"})), HasSubstr("--listen needs a value"));
}

TEST(OptionsTest, ConfigFilesAreCheckedAlike) {
  const auto message = [](const char* text) {
    const ConfigFile file(text);
    return MessageOf(ParseCommandLine({file.flag()}));
  };
  EXPECT_THAT(message(R"({"max-sesions": 5})"), HasSubstr("unknown setting \"max-sesions\""));
  EXPECT_THAT(message(R"({"max-sessions": -1})"),
              AllOf(HasSubstr("max-sessions"), HasSubstr("\"-1\"")));
  EXPECT_THAT(message(R"({"max-sessions": [1]})"), HasSubstr("max-sessions"));
  EXPECT_THAT(message(R"({"max-sessions": null})"), HasSubstr("max-sessions"));
  EXPECT_THAT(message("not json"), HasSubstr("not a JSON object"));
  EXPECT_THAT(message("[]"), HasSubstr("not a JSON object"));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--config=/no/such/file"})), HasSubstr("/no/such/file"));
}

TEST(OptionsTest, ClashingAddressesNameBothSettings) {
  EXPECT_THAT(
      MessageOf(ParseCommandLine({"--listen=127.0.0.1:9000", "--metrics-listen=127.0.0.1:9000"})),
      AllOf(HasSubstr("listen and metrics-listen"), HasSubstr("127.0.0.1:9000")));
  EXPECT_THAT(
      MessageOf(ParseCommandLine({"--admin-listen=[::1]:9000", "--metrics-listen=[::1]:9000"})),
      HasSubstr("metrics-listen and admin-listen"));
  // Port 0 is another free port each time.
  EXPECT_EQ(MessageOf(ParseCommandLine({"--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0"})),
            "OK");
}

TEST(OptionsTest, PlaintextStaysOnLoopback) {
  EXPECT_THAT(
      MessageOf(ParseCommandLine({"--listen=0.0.0.0:7000"})),
      AllOf(HasSubstr("setting listen"), HasSubstr("0.0.0.0:7000"), HasSubstr("allow-plaintext")));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--listen=127.example.com:7000"})),
              HasSubstr("not loopback"));
  EXPECT_EQ(MessageOf(ParseCommandLine({"--listen=0.0.0.0:7000", "--allow-plaintext"})), "OK");
  EXPECT_EQ(MessageOf(ParseCommandLine({"--listen=[::1]:7000"})), "OK");
  EXPECT_EQ(MessageOf(ParseCommandLine({"--listen=", "--unix-socket=/tmp/a.sock"})), "OK");
  EXPECT_THAT(MessageOf(ParseCommandLine({"--listen="})), HasSubstr("both empty"));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--tls-cert=a.pem"})), HasSubstr("tls-key"));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--tls-ca=a.pem"})), HasSubstr("tls-ca"));
}

TEST(OptionsTest, LimitsThatContradictEachOtherAreRefused) {
  EXPECT_THAT(MessageOf(ParseCommandLine({"--default-lease=2h"})),
              AllOf(HasSubstr("default-lease"), HasSubstr("max-lease")));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--max-queued-bytes=1MiB"})),
              AllOf(HasSubstr("max-message-bytes"), HasSubstr("max-queued-bytes")));
  EXPECT_THAT(MessageOf(ParseCommandLine({"--unix-socket=" + std::string(200, 'a')})),
              HasSubstr("unix-socket"));
}

TEST(OptionsTest, HostPortTakesNamesAndBracketedAddresses) {
  EXPECT_EQ(ParseHostPort("localhost:80")->host, "localhost");
  EXPECT_EQ(ParseHostPort("[::1]:443")->host, "::1");
  EXPECT_EQ(ParseHostPort("[::1]:443")->port, 443);
  for (const char* bad : {"", ":", "host", "host:", "host:x", ":80", "::1:80", "host:65536",
                          "host:-1", "[::1:80", "[]:80"}) {
    EXPECT_EQ(ParseHostPort(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

TEST(OptionsTest, ThePrintedConfigReadsBack) {
  auto line = ParseCommandLine({"--print-config", "--drain-pause=1500ms", "--pool-bytes=64MiB"});
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(line->action, Action::kPrintConfig);
  const std::string json = OptionsJson(line->options);
  ServerOptions read;
  ASSERT_TRUE(ApplyConfigJson(json, &read).ok()) << ApplyConfigJson(json, &read);
  EXPECT_EQ(read.drain_pause, absl::Milliseconds(1500));
  EXPECT_EQ(OptionsJson(read), json);
}

TEST(OptionsTest, TheExampleFileHoldsEverySettingWithItsDefault) {
  const std::filesystem::path path =
      std::filesystem::path(__FILE__).parent_path() / "../../deploy/adaattn-server.example.json";
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  EXPECT_EQ(text.str(), OptionsJson(ServerOptions())) << path;
}

TEST(OptionsTest, HelpNamesEverySetting) {
  ServerOptions defaults;
  const std::string help = HelpText();
  for (const Setting& setting : SettingTable(&defaults)) {
    EXPECT_THAT(help, HasSubstr(std::string("--") + setting.name + "="));
  }
}

}  // namespace
}  // namespace adaattn

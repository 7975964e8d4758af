#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "client/cli_args.h"
#include "client/cli_commands.h"
#include "client/cli_report.h"
#include "client/replay.h"

namespace adaattn::client {
namespace {

using Strings = std::vector<std::string>;

const std::vector<Flag>& Flags() {
  static const std::vector<Flag> flags = {{"name", Flag::Type::kString, "x", ""},
                                          {"count", Flag::Type::kInt, "3", ""},
                                          {"share", Flag::Type::kDouble, "0.5", ""},
                                          {"json", Flag::Type::kBool, "false", ""}};
  return flags;
}

TEST(CliArgsTest, FlagsTakeBothSpellingsAndKeepTheirDefaults) {
  const auto args =
      Args::Parse(Strings{"--count=7", "trace", "--name", "y", "--json", "--", "--rest"}, Flags());
  ASSERT_TRUE(args.ok()) << args.status();
  EXPECT_EQ(args->Int("count"), 7);
  EXPECT_EQ(args->String("name"), "y");
  EXPECT_EQ(args->Double("share"), 0.5);
  EXPECT_TRUE(args->Bool("json"));
  EXPECT_TRUE(args->Has("count"));
  EXPECT_FALSE(args->Has("share"));
  EXPECT_EQ(args->positional(), Strings({"trace", "--rest"}));
}

TEST(CliArgsTest, WhatMakesNoSenseIsNamed) {
  for (const auto& [argument, part] :
       {std::make_pair("--nothing=1", "--nothing"), std::make_pair("--count=many", "\"many\""),
        std::make_pair("--share=half", "\"half\""), std::make_pair("--json=2", "--json"),
        std::make_pair("--name", "needs a value")}) {
    const auto args = Args::Parse(Strings{argument}, Flags());
    EXPECT_EQ(args.status().code(), absl::StatusCode::kInvalidArgument) << argument;
    EXPECT_NE(args.status().message().find(part), absl::string_view::npos) << args.status();
  }
}

TEST(CliArgsTest, NumbersOutOfRangeAreRefusedAndSoIsNan) {
  for (const char* share : {"-0.1", "1.1", "nan"}) {
    const auto args = Args::Parse(Strings{"--share", share}, Flags());
    ASSERT_TRUE(args.ok()) << args.status();
    EXPECT_FALSE(CheckRange(*args, "share", 0, 1).ok()) << share;
  }
}

TEST(CliArgsTest, AttendFlagsSayHowToAttend) {
  const auto args = Args::Parse(
      Strings{"--page-format=bf16", "--policy=threshold", "--theta=.002", "--coarse-rank=0"},
      AttendFlags());
  ASSERT_TRUE(args.ok()) << args.status();
  const auto choice = ParseAttendFlags(*args, "exact");
  ASSERT_TRUE(choice.ok()) << choice.status();
  EXPECT_EQ(choice->page_format, PageFormat::kBf16);
  EXPECT_EQ(choice->element_type, DType::kUnspecified);
  EXPECT_EQ(choice->options.mode, Mode::kExact);
  EXPECT_EQ(choice->options.policy, Policy::kThreshold);
  EXPECT_FLOAT_EQ(choice->options.theta, 0.002f);
  EXPECT_EQ(choice->options.coarse_rank, 0);
  EXPECT_FALSE(choice->options.coarse_z.has_value());
  EXPECT_FALSE(ParseAttendFlags(*args, "quickly").ok());
  const auto typed = Args::Parse(Strings{"--element-type=bf16"}, AttendFlags());
  ASSERT_TRUE(typed.ok()) << typed.status();
  EXPECT_EQ(ParseAttendFlags(*typed, "")->element_type, DType::kBf16);
  EXPECT_EQ(choice->exact_tier, ExactTier::kNone);
  const auto tier = Args::Parse(Strings{"--exact-tier=host_pages"}, AttendFlags());
  ASSERT_TRUE(tier.ok()) << tier.status();
  EXPECT_EQ(ParseAttendFlags(*tier, "deterministic")->exact_tier, ExactTier::kHostPages);
  const auto wrong = Args::Parse(Strings{"--element-type=int8"}, AttendFlags());
  ASSERT_TRUE(wrong.ok()) << wrong.status();
  EXPECT_FALSE(ParseAttendFlags(*wrong, "").ok());
}

TEST(CliReportTest, ColumnsAlignAndNumbersStandRight) {
  EXPECT_EQ(FormatTable({{"name", "n"}, {"a", "1"}, {"long name", "100"}}),
            "name         n\na            1\nlong name  100\n");
}

TEST(CliReportTest, AProfileIsALineALayer) {
  ProfileSummary profile;
  profile.model = {2, 4, 2, 64};
  profile.bytes = 2048;
  profile.has_basis = true;
  profile.error_factors = {1, 1, 0.5f, 2};
  profile.audits = {7, 9, 0, 3};
  profile.audited_error_factors = {0.75f, 1.25f, 0.5f, 2};
  EXPECT_EQ(FormatProfile(profile),
            "2x4/2x64, with bases, without a policy, 2.0 KiB\n"
            "layer  audits a kv head  error factors  audits say\n"
            "    0                 7  1.00 to 1.00   0.75 to 1.25\n"
            "    1                 0  0.50 to 2.00   0.50 to 2.00\n");
  EXPECT_EQ(ToJson(profile)["audits"].dump(), "[7,9,0,3]");
}

TEST(CliReportTest, TheReportHasTheKeysOfItsContract) {
  ReplayReport report;
  report.trace = "t";
  report.mode = "budget";
  Strings keys;
  const auto json = ToReportJson(report);
  for (const auto& item : json.items()) keys.push_back(item.key());
  EXPECT_EQ(keys, Strings({"trace", "mode", "theta", "relative_error_mean", "relative_error_p99",
                           "lse_error_max", "bytes_read", "bytes_bf16", "bytes_fraction",
                           "mean_key_bits", "mean_value_bits", "mean_rank", "latency_us"}));
  EXPECT_TRUE(json["theta"].is_null());
  EXPECT_TRUE(json["latency_us"].contains("p50") && json["latency_us"].contains("p99"));
}

TEST(QuantilesTest, InterpolateBetweenRanks) {
  const Quantiles quantiles = ComputeQuantiles({4, 1, 3, 2});
  EXPECT_DOUBLE_EQ(quantiles.p50, 2.5);
  EXPECT_DOUBLE_EQ(quantiles.p99, 3.97);
  EXPECT_DOUBLE_EQ(ComputeQuantiles({5}).p99, 5);
  EXPECT_DOUBLE_EQ(ComputeQuantiles({}).p50, 0);
}

}  // namespace
}  // namespace adaattn::client

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/tuning.h"

namespace adaattn {
namespace {

using ::testing::HasSubstr;

CudaTuning Measured() {
  CudaTuning tuning;
  tuning.device = "Some GPU 80GB";
  tuning.exact_ctas_per_sm = 3;
  tuning.progressive_cta_percent = 150;
  tuning.crossovers = {{8, 4096, 8192}, {64, 1024, Crossover::kNeverFaster}};
  return tuning;
}

std::string Device(const std::string& fields) {
  return absl::StrCat(R"({"version": 1, "devices": [{"device": "x", )", fields, "}]}");
}

TEST(CudaTuningTest, ReadsWhatItWrites) {
  const auto read = ParseTuning(FormatTuning(Measured(), R"({"commit": "abc"})"));
  ASSERT_TRUE(read.ok()) << read.status();
  ASSERT_EQ(read->size(), 1u);
  const CudaTuning& tuning = read->front();
  EXPECT_EQ(tuning.device, "Some GPU 80GB");
  EXPECT_EQ(tuning.exact_ctas_per_sm, 3);
  EXPECT_EQ(tuning.progressive_cta_percent, 150);
  ASSERT_EQ(tuning.crossovers.size(), 2u);
  EXPECT_EQ(tuning.crossovers[0].over_fp8, 8192);
  EXPECT_EQ(tuning.crossovers[1].kv_heads, 64);
  EXPECT_EQ(tuning.crossovers[1].over_bf16, 1024);
  EXPECT_EQ(tuning.crossovers[1].over_fp8, Crossover::kNeverFaster);
}

TEST(CudaTuningTest, FindsTheNearestCrossoverBelow) {
  const CudaTuning tuning = Measured();
  EXPECT_EQ(tuning.CrossoverAt(1).kv_heads, 8);
  EXPECT_EQ(tuning.CrossoverAt(8).kv_heads, 8);
  EXPECT_EQ(tuning.CrossoverAt(63).kv_heads, 8);
  EXPECT_EQ(tuning.CrossoverAt(64).kv_heads, 64);
  EXPECT_EQ(tuning.CrossoverAt(5000).kv_heads, 64);
  EXPECT_EQ(CudaTuning().CrossoverAt(8).over_bf16, 0);
}

TEST(CudaTuningTest, RefusesWhatItDoesNotUnderstandAndSaysWhy) {
  const std::string rest = R"("progressive_cta_percent": 100, "crossovers": [], "provenance": {})";
  const std::string head = R"("exact_ctas_per_sm": 2, "progressive_cta_percent": 100, )";
  const struct {
    std::string text;
    const char* message;
  } cases[] = {
      {"", "not JSON"},
      {"[]", "file is []; must be an object"},
      {R"({"devices": []})", "file lacks version"},
      {R"({"version": 2, "devices": []})", "file.version is 2; must be an integer from 1 to 1"},
      {R"({"version": 1})", "file lacks devices"},
      {R"({"version": 1, "devices": {}})", "devices is {}; must be an array"},
      {R"({"version": 1, "devices": [], "more": 1})", "without further fields"},
      {R"({"version": 1, "devices": [7]})", "devices[0] is 7; must be an object"},
      {Device(rest), "devices[0] lacks exact_ctas_per_sm"},
      {Device(absl::StrCat(R"("exact_ctas_per_sm": 9, )", rest)), "from 1 to 8"},
      {Device(absl::StrCat(R"("exact_ctas_per_sm": 2.5, )", rest)), "is 2.5"},
      {Device(absl::StrCat(R"("exact_ctas_per_sm": 1e300, )", rest)), "from 1 to 8"},
      {Device(absl::StrCat(R"("exact_ctas_per_sm": 2, "x": 1, )", rest)), "further fields"},
      {Device(head + R"("crossovers": 3, "provenance": {})"), "crossovers is 3"},
      {Device(head + R"("crossovers": [{"kv_heads": 8, "over_bf16": -1, "over_fp8": 0}],
                        "provenance": {})"),
       "devices[0].crossovers[0].over_bf16 is -1"},
      {Device(head + R"("crossovers": [{"kv_heads": 8, "over_bf16": 1, "over_fp8": 1},
                                       {"kv_heads": 8, "over_bf16": 1, "over_fp8": 1}],
                        "provenance": {})"),
       "crossovers[1].kv_heads is 8; must be an integer from 9"},
  };
  for (const auto& test : cases) {
    const auto read = ParseTuning(test.text);
    ASSERT_FALSE(read.ok()) << test.text;
    EXPECT_EQ(read.status().code(), absl::StatusCode::kInvalidArgument) << test.text;
    EXPECT_THAT(std::string(read.status().message()), HasSubstr(test.message)) << test.text;
  }
}

TEST(CudaTuningTest, FallsBackToBuiltInNumbersForOtherDevices) {
  const std::string path = absl::StrCat(testing::TempDir(), "/tuning.json");
  std::ofstream(path) << FormatTuning(Measured(), "{}");
  const auto known = LoadTuning(path, "Some GPU 80GB");
  const auto unknown = LoadTuning(path, "Another GPU");
  const auto unset = LoadTuning("", "Some GPU 80GB");
  ASSERT_TRUE(known.ok() && unknown.ok() && unset.ok());
  EXPECT_EQ(known->exact_ctas_per_sm, 3);
  for (const CudaTuning& tuning : {*unknown, *unset}) {
    EXPECT_EQ(tuning.device, "");
    EXPECT_EQ(tuning.exact_ctas_per_sm, CudaTuning().exact_ctas_per_sm);
    EXPECT_TRUE(tuning.crossovers.empty());
  }
}

TEST(CudaTuningTest, NamesTheFileThatIsMissingOrBroken) {
  const auto missing = LoadTuning("/no/such/tuning.json", "x");
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.status().message()), HasSubstr("/no/such/tuning.json"));
  const std::string path = absl::StrCat(testing::TempDir(), "/broken.json");
  std::ofstream(path) << "{";
  const auto broken = LoadTuning(path, "x");
  EXPECT_EQ(broken.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(broken.status().message()), HasSubstr("broken.json: tuning: not JSON"));
}

}  // namespace
}  // namespace adaattn

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
  tuning.conclude_pages = 16;
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
  EXPECT_EQ(tuning.conclude_pages, 16);
  ASSERT_EQ(tuning.crossovers.size(), 2u);
  EXPECT_EQ(tuning.crossovers[0].over_fp8, 8192);
  EXPECT_EQ(tuning.crossovers[1].kv_heads, 64);
  EXPECT_EQ(tuning.crossovers[1].over_bf16, 1024);
  EXPECT_EQ(tuning.crossovers[1].over_fp8, Crossover::kNeverFaster);
}

TEST(CudaTuningTest, ReadsFilesThatDoNotSayWhenToConclude) {
  const auto read = ParseTuning(
      Device(R"("exact_ctas_per_sm": 2, "progressive_cta_percent": 100, "crossovers": [],
                "provenance": {})"));
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->front().conclude_pages, CudaTuning().conclude_pages);
}

TEST(CudaTuningTest, SessionsSealFromTheCrossoverOver16BitPages) {
  CudaTuning tuning = Measured();
  tuning.crossovers.push_back({128, Crossover::kNeverFaster, 0});
  const std::vector<SealCrossover> crossovers = SealCrossovers(tuning);
  ASSERT_EQ(crossovers.size(), 3u);
  EXPECT_EQ(crossovers[0].kv_heads, 8);
  EXPECT_EQ(crossovers[0].tokens, 4096);
  EXPECT_EQ(crossovers[1].tokens, 1024);
  EXPECT_EQ(crossovers[2].tokens, SealCrossover::kNever);
  EXPECT_TRUE(SealCrossovers(CudaTuning()).empty());
}

TEST(CudaTuningTest, KnowsTheDevicesThatItWasMeasuredOn) {
  for (const char* device : {"NVIDIA H100 80GB HBM3", "NVIDIA H200"}) {
    const CudaTuning known = BuiltInTuning(device);
    EXPECT_EQ(known.device, device);
    ASSERT_FALSE(known.crossovers.empty());
    for (size_t i = 1; i < known.crossovers.size(); ++i) {
      EXPECT_LT(known.crossovers[i - 1].kv_heads, known.crossovers[i].kv_heads);
    }
    // What is built in is what a file could say.
    const auto read = ParseTuning(FormatTuning(known, "{}"));
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_EQ(read->front().crossovers.size(), known.crossovers.size());
  }
  EXPECT_EQ(BuiltInTuning("NVIDIA H100 80GB").device, "") << "names are compared whole";
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
      {Device(absl::StrCat(R"("exact_ctas_per_sm": 2, "conclude_pages": 129, )", rest)),
       "conclude_pages is 129; must be an integer from 0 to 128"},
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

TEST(CudaTuningTest, AFileGoesBeforeTheTableAndTheTableBeforeDefaults) {
  const std::string path = absl::StrCat(testing::TempDir(), "/tuning.json");
  std::ofstream(path) << FormatTuning(Measured(), "{}");
  const auto known = LoadTuning(path, "Some GPU 80GB");
  ASSERT_TRUE(known.ok());
  EXPECT_EQ(known->tuning.exact_ctas_per_sm, 3);
  EXPECT_EQ(known->source, path);
  for (const std::string& file : {path, std::string()}) {
    const auto table = LoadTuning(file, "NVIDIA H100 80GB HBM3");
    ASSERT_TRUE(table.ok());
    EXPECT_EQ(table->tuning.device, "NVIDIA H100 80GB HBM3");
    EXPECT_EQ(table->source, "built-in, NVIDIA H100 80GB HBM3");
    const auto defaults = LoadTuning(file, "Another GPU");
    ASSERT_TRUE(defaults.ok());
    EXPECT_EQ(defaults->tuning.device, "");
    EXPECT_EQ(defaults->tuning.exact_ctas_per_sm, CudaTuning().exact_ctas_per_sm);
    EXPECT_TRUE(defaults->tuning.crossovers.empty());
    EXPECT_EQ(defaults->source, "built-in");
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

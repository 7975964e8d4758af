#include "server/policy_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "kernels/policy/theta.h"
#include "loadtest/head_steps.h"

namespace adaattn {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using Json = nlohmann::json;

Json GoodFile() {
  Json file = {{"format", "adaattn-policy"},
               {"version", 1},
               {"features", Json::array()},
               {"weights", {1, 2, 3.5, -4, 0, 0.25, 1e-3, 8}},
               {"quantile", 0.1}};
  for (const char* name : kThetaFeatureNames) file["features"].push_back(name);
  return file;
}

TEST(PolicyFileTest, GivesTheWeights) {
  const auto model = ParsePolicyFile(GoodFile().dump());
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_THAT(model->weights, ::testing::ElementsAre(1, 2, 3.5f, -4, 0, 0.25f, 1e-3f, 8));
}

// `spoil` changes a good file; the error must say all of `parts`.
void ExpectRefused(void (*spoil)(Json*), const std::vector<std::string>& parts) {
  Json file = GoodFile();
  spoil(&file);
  const absl::Status status = ParsePolicyFile(file.dump()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  for (const std::string& part : parts) EXPECT_THAT(status.message(), HasSubstr(part));
}

TEST(PolicyFileTest, RefusesWhatItDoesNotKnow) {
  ExpectRefused([](Json* f) { (*f)["version"] = 2; }, {"version", "2", "must be 1"});
  ExpectRefused([](Json* f) { f->erase("version"); }, {"version", "nothing"});
  ExpectRefused([](Json* f) { (*f)["format"] = "other"; }, {"format", "other", "adaattn-policy"});
  ExpectRefused([](Json* f) { (*f)["features"][2] = "colour"; }, {"features", "colour", "entropy"});
  ExpectRefused([](Json* f) { (*f)["features"].erase(7); }, {"features"});
  ExpectRefused([](Json* f) { (*f)["weights"].erase(0); }, {"weights", "8 finite numbers"});
  ExpectRefused([](Json* f) { (*f)["weights"].push_back(1); }, {"weights"});
  ExpectRefused([](Json* f) { (*f)["weights"] = "many"; }, {"weights", "many"});
  ExpectRefused([](Json* f) { f->erase("weights"); }, {"weights", "nothing"});
  ExpectRefused([](Json* f) { (*f)["weights"][3] = nullptr; }, {"weights[3]", "null"});
  ExpectRefused([](Json* f) { (*f)["weights"][4] = 2e3; }, {"weights[4]", "2000"});
}

TEST(PolicyFileTest, AnyTextIsSafe) {
  for (const std::string text :
       {"", "{", "[]", "7", "\"adaattn-policy\"", "{\"weights\": 1e999}", "\xff\xfe"}) {
    EXPECT_EQ(ParsePolicyFile(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
  const std::string huge = GoodFile().dump() + std::string(kMaxPolicyBytes, ' ');
  EXPECT_THAT(ParsePolicyFile(huge).status().message(), HasSubstr("size"));
}

TEST(PolicyFileTest, FilesAreNamedInErrors) {
  EXPECT_EQ(LoadPolicyFile("/nonexistent/policy.json").status().code(),
            absl::StatusCode::kNotFound);
  const std::string path = ::testing::TempDir() + "/bad_policy.json";
  std::ofstream(path) << "{}";
  EXPECT_THAT(LoadPolicyFile(path).status().message(), AllOf(HasSubstr(path), HasSubstr("format")));
}

// tests/data/policy.json is what adaattn.fit_policy makes of the two traces beside it. That its
// thetas do here what they did there shows that both compute the same features.
TEST(LearnedPolicyTest, DoesWhatItWasFittedToDo) {
  const auto trace = LoadTrace("data/smollm2-135m-layer15-8k.safetensors");
  const auto model = LoadPolicyFile("data/policy.json");
  ASSERT_TRUE(trace.ok() && model.ok()) << trace.status() << model.status();
  auto steps = HeadStepTrace::Make(&*trace, [](int64_t bytes) {
    BackendOptions options;
    options.pool_bytes = bytes;
    return CreateCpuBackend(options).value();
  });
  ASSERT_TRUE(steps.ok()) << steps.status();
  for (const float target : {0.03f, 0.05f, 0.1f}) {
    DecisionParams params;
    params.policy = Policy::kLearned;
    params.target_relative_error = target;
    params.theta_model = *model;
    const auto run = steps->Run(params);
    ASSERT_TRUE(run.ok()) << run.status();
    const HeadStepSummary summary = steps->Summarise(*run, target);
    std::printf("target %.2f: mean %.4f above %.3f bytes %.4f\n", target, summary.mean_error,
                summary.above, summary.bytes);
    EXPECT_GE(summary.mean_error, 0.25 * target);
    EXPECT_LE(summary.mean_error, 0.6 * target);
    EXPECT_LE(summary.above, 0.08);
  }
}

}  // namespace
}  // namespace adaattn

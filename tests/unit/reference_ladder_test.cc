// The ladder on real attention, in the float64 reference: page depths against those of an
// independent statement of it in PyTorch (data/ladder_*.json), errors and bytes against what the
// design must reach.

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "kernels/policy/ladder.h"
#include "unit/trace_testing.h"

namespace adaattn {
namespace {

using Json = nlohmann::json;

const char* const kQwen = "qwen25-coder-1.5b-layer14-8k";
const char* const kSmol = "smollm2-135m-layer15-8k";

// Sealing a whole trace takes a second: once for all tests of the process.
const TraceReplay& Replay(const std::string& name) {
  static auto* const replays = new std::map<std::string, std::unique_ptr<TraceReplay>>;
  std::unique_ptr<TraceReplay>& replay = (*replays)[name];
  if (replay == nullptr) {
    replay = std::make_unique<TraceReplay>("data/" + name + ".safetensors", /*fit_tokens=*/1024,
                                           /*stored_bits=*/8);
  }
  return *replay;
}

DecisionParams Threshold(float theta, int32_t coarse_rank = 0) {
  DecisionParams params;
  params.theta = theta;
  params.coarse_rank = coarse_rank;
  params.coarse_z = 2.0f;
  return params;
}

// Mean over heads and every row_step-th row with at least two sealed pages, as the design's tables
// are made.
struct Summary {
  double error = 0;
  double p99 = 0;
  double bytes_fraction = 0;  // of BF16's, basis bytes excluded
  double ratio_median = 0;    // actual / predicted
  double exceeded = 0;        // fraction of actual > predicted
};

Summary Summarise(const TraceReplay& replay, const DecisionParams& params, int32_t row_step) {
  const AttentionShape& shape = replay.trace().shape;
  std::vector<double> errors, ratios;
  double fraction = 0;
  int64_t steps = 0;
  for (int32_t row = 0; row < replay.trace().num_rows; row += row_step) {
    if (replay.num_sealed_pages(row) < 2) continue;
    for (int32_t head = 0; head < shape.num_kv_heads; ++head, ++steps) {
      const ProgressiveResultF64 result = replay.Run(head, row, params);
      for (int32_t g = 0; g < shape.group_size(); ++g) {
        errors.push_back(replay.Error(result, head, row, g));
        ratios.push_back(errors.back() / result.predicted[static_cast<size_t>(g)]);
      }
      const auto read =
          static_cast<double>(result.decision.key_bytes + result.decision.value_bytes);
      fraction += read / static_cast<double>(replay.visible_tokens(row) * shape.head_dim * 4);
    }
  }
  Summary summary;
  for (const double error : errors) summary.error += error / static_cast<double>(errors.size());
  std::sort(errors.begin(), errors.end());
  summary.p99 = errors[errors.size() * 99 / 100];
  summary.bytes_fraction = fraction / static_cast<double>(steps);
  std::sort(ratios.begin(), ratios.end());
  summary.ratio_median = ratios[ratios.size() / 2];
  const auto above = std::upper_bound(ratios.begin(), ratios.end(), 1.0);
  summary.exceeded = static_cast<double>(ratios.end() - above) / static_cast<double>(ratios.size());
  return summary;
}

// The letters of data/ladder_*.json.
char DepthLetter(const PageDepth& depth, int32_t num_chunks) {
  if (depth.key.chunks < num_chunks) return 'c';
  switch (depth.key.bits * 10 + depth.value_bits) {
    case 40:
      return 'a';
    case 42:
      return 'b';
    case 64:
      return 'd';
    case 86:
      return 'e';
    case 88:
      return 'f';
    default:
      return '?';
  }
}

// Compares every page of every row; returns the number of pages and of those that differ.
std::pair<int64_t, int64_t> CompareDepths(const TraceReplay& replay, const Json& run) {
  const AttentionShape& shape = replay.trace().shape;
  const DecisionParams params =
      Threshold(run["theta"].get<float>(), run["coarse_rank"].get<int32_t>());
  int64_t pages = 0, different = 0;
  for (const Json& row : run["rows"]) {
    const auto index = row["row"].get<int32_t>();
    for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
      const auto expected = row["heads"][static_cast<size_t>(head)].get<std::string>();
      const ProgressiveResultF64 result = replay.Run(head, index, params);
      EXPECT_EQ(result.depths.size(), expected.size());
      std::string actual;
      for (const PageDepth& depth : result.depths) {
        actual.push_back(DepthLetter(depth, NumRankChunks(shape.head_dim)));
      }
      for (size_t p = 0; p < std::min(actual.size(), expected.size()); ++p) {
        ++pages;
        different += actual[p] != expected[p] ? 1 : 0;
        // Only one rung apart (or opened against not opened): a share near a threshold.
        const std::string rungs = "abdef";
        const auto a = static_cast<int>(rungs.find(actual[p] == 'c' ? 'a' : actual[p]));
        const auto b = static_cast<int>(rungs.find(expected[p] == 'c' ? 'a' : expected[p]));
        EXPECT_LE(std::abs(a - b), 1) << "row " << index << " head " << head << " page " << p
                                      << ": " << actual[p] << " against " << expected[p];
      }
    }
  }
  return {pages, different};
}

class LadderDepthsTest : public ::testing::TestWithParam<const char*> {};

TEST_P(LadderDepthsTest, AgreeWithTheirStatementInPyTorch) {
  std::ifstream file(std::string("data/ladder_") + GetParam() + ".json");
  const Json expected = Json::parse(file, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(expected.is_object());
  ASSERT_EQ(expected["runs"].size(), 3u);
  for (const Json& run : expected["runs"]) {
    ASSERT_GE(run["rows"].size(), 60u);
    const auto [pages, different] = CompareDepths(Replay(GetParam()), run);
    const double fraction = static_cast<double>(different) / static_cast<double>(pages);
    // The bases differ by FP16 rounding, so shares near a threshold may fall on its other side.
    EXPECT_LT(fraction, 0.004) << "theta " << run["theta"] << " coarse " << run["coarse_rank"];
    std::cout << GetParam() << " theta " << run["theta"] << " coarse rank " << run["coarse_rank"]
              << ": " << different << " of " << pages << " pages differ\n";
  }
}

INSTANTIATE_TEST_SUITE_P(Traces, LadderDepthsTest, ::testing::Values(kQwen, kSmol),
                         [](const auto& info) { return info.param == kQwen ? "qwen" : "smol"; });

struct Goal {
  const char* trace;
  float theta;
  bool two_stages;
  double error;
  double bytes_fraction;
};

class LadderGoalTest : public ::testing::TestWithParam<Goal> {};

TEST_P(LadderGoalTest, IsReachedOverAllHeadsAndRows) {
  const Goal& goal = GetParam();
  const TraceReplay& replay = Replay(goal.trace);
  const int32_t coarse = goal.two_stages ? replay.trace().shape.head_dim / 2 : 0;
  const Summary summary = Summarise(replay, Threshold(goal.theta, coarse), /*row_step=*/1);
  EXPECT_LE(summary.error, goal.error);
  EXPECT_LE(summary.bytes_fraction, goal.bytes_fraction);
  EXPECT_GT(summary.error, 0.001) << "too good to be the ladder";
  std::cout << goal.trace << " theta " << goal.theta << (goal.two_stages ? " two stages" : "")
            << ": error " << summary.error << " p99 " << summary.p99 << " bytes "
            << summary.bytes_fraction << "\n";
}

INSTANTIATE_TEST_SUITE_P(Goals, LadderGoalTest,
                         ::testing::Values(Goal{kQwen, .004f, false, .032, .180},
                                           Goal{kSmol, .004f, false, .025, .177},
                                           Goal{kQwen, .004f, true, .032, .163},
                                           Goal{kSmol, .004f, true, .025, .152},
                                           Goal{kQwen, .0005f, false, .012, .236},
                                           Goal{kSmol, .0005f, false, .010, .236}));

TEST(BudgetOnTracesTest, PredictionsAreCalibratedAndTargetsHeld) {
  for (const char* name : {kQwen, kSmol}) {
    for (const float target : {0.02f, 0.05f, 0.1f}) {
      DecisionParams params;
      params.policy = Policy::kBudget;
      params.target_relative_error = target;
      const Summary summary = Summarise(Replay(name), params, /*row_step=*/4);
      EXPECT_LT(summary.error, target) << name;
      EXPECT_GT(summary.ratio_median, 0.4) << name << " target " << target;
      EXPECT_LT(summary.ratio_median, 1.2) << name << " target " << target;
      EXPECT_LT(summary.exceeded, 0.5) << name << " target " << target;
      std::cout << name << " target " << target << ": error " << summary.error << " p99 "
                << summary.p99 << " bytes " << summary.bytes_fraction << " actual/predicted median "
                << summary.ratio_median << " exceeded " << summary.exceeded << "\n";
    }
  }
}

}  // namespace
}  // namespace adaattn

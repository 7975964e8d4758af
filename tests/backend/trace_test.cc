// The captured traces through a backend: accuracy and bytes of dense pages and of the ladder.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "kernels/policy/names.h"
#include "loadtest/head_steps.h"
#include "loadtest/trace_cache.h"
#include "tests/backend/backend_harness.h"

namespace adaattn {
namespace {

constexpr char kQwen[] = "data/qwen25-coder-1.5b-layer14-8k.safetensors";
constexpr char kSmol[] = "data/smollm2-135m-layer15-8k.safetensors";

struct TraceError {
  double mean = 0;  // relative L2 error of a head's output, mean over heads and rows
  double p99 = 0;
  double lse_max = 0;
  double fraction = 0;  // bytes of K and V over those of a BF16 cache, mean over rows
};

TraceError Measure(const Trace& trace, const std::vector<TraceRowResult>& results,
                   const std::vector<int32_t>& rows) {
  const AttentionShape& shape = trace.shape;
  const int64_t d = shape.head_dim;
  std::vector<double> errors;
  TraceError total;
  for (size_t i = 0; i < rows.size(); ++i) {
    for (int32_t head = 0; head < shape.num_q_heads; ++head) {
      const int64_t at = int64_t{head} * trace.num_rows + rows[i];
      double error = 0, norm = 0;
      for (int32_t c = 0; c < d; ++c) {
        const double want = trace.expected_o[at * d + c];
        error += std::pow(results[i].out[head * d + c] - want, 2);
        norm += want * want;
      }
      errors.push_back(std::sqrt(error / norm));
      total.lse_max =
          std::max<double>(total.lse_max, std::abs(results[i].lse[head] - trace.expected_lse[at]));
    }
    int64_t bytes = 0;
    for (const HeadDecision& decision : results[i].decisions) {
      bytes += decision.key_bytes + decision.value_bytes;
    }
    const double bf16 = 4.0 * (trace.positions[rows[i]] + 1) * shape.num_kv_heads * d;
    total.fraction += static_cast<double>(bytes) / bf16 / static_cast<double>(rows.size());
  }
  for (const double error : errors) total.mean += error / static_cast<double>(errors.size());
  std::sort(errors.begin(), errors.end());
  total.p99 = errors[errors.size() * 99 / 100];
  return total;
}

// All rows of the trace as one batch.
TraceError RunTrace(const std::string& path, PageFormat format, const DecisionParams& decision,
                    int32_t stored_bits = 8) {
  const absl::StatusOr<Trace> trace = LoadTrace(path);
  EXPECT_TRUE(trace.ok()) << trace.status();
  if (!trace.ok()) return TraceError();
  const std::unique_ptr<Backend> backend =
      MakeTestBackend(TraceCache::PoolBytes(*trace, format, stored_bits));
  if (backend == nullptr) return TraceError();
  const auto cache = TraceCache::Make(backend.get(), &*trace, format, stored_bits);
  EXPECT_TRUE(cache.ok()) << cache.status();
  std::vector<SequenceStep> steps;
  std::vector<int32_t> rows;
  for (int32_t row = 0; row < trace->num_rows; ++row) {
    // Fewer than two sealed pages show nothing of the ladder; the script leaves them out too.
    if (trace->positions[row] + 1 < 3 * kPageTokens) continue;
    rows.push_back(row);
    steps.push_back((*cache)->Step(row, decision));
  }
  const auto results = (*cache)->Attend(steps, rows);
  EXPECT_TRUE(results.ok()) << results.status();
  for (const TraceRowResult& result : *results) {
    for (const HeadDecision& head : result.decisions) {
      const ReadBytes recount = RecountBytes(head, trace->shape.head_dim, DenseDType(format));
      EXPECT_EQ(head.key_bytes, recount.key);
      EXPECT_EQ(head.value_bytes, recount.value);
    }
  }
  const TraceError error = Measure(*trace, *results, rows);
  std::printf("error mean %.6f p99 %.6f lse %.6f bytes %.4f\n", error.mean, error.p99,
              error.lse_max, error.fraction);
  return error;
}

DecisionParams Ladder(float theta, int32_t coarse_rank) {
  DecisionParams params;
  params.theta = theta;
  params.coarse_rank = coarse_rank;
  params.coarse_z = 2;
  return params;
}

TEST(DenseTraceTest, Fp32PagesAreExact) {
  for (const char* path : {kQwen, kSmol}) {
    const TraceError error = RunTrace(path, PageFormat::kF32, DecisionParams());
    EXPECT_LE(error.p99, 1e-5);
    EXPECT_LE(error.lse_max, 1e-4);
  }
}

TEST(DenseTraceTest, Fp16PagesKeepTheirRounding) {
  for (const char* path : {kQwen, kSmol}) {
    const TraceError error = RunTrace(path, PageFormat::kF16, DecisionParams());
    EXPECT_LE(error.p99, 1e-3);
    EXPECT_LE(error.lse_max, 1e-3);
  }
}

TEST(DenseTraceTest, Bf16PagesKeepTheirRounding) {
  for (const char* path : {kQwen, kSmol}) {
    const TraceError error = RunTrace(path, PageFormat::kBf16, DecisionParams());
    EXPECT_LE(error.mean, 8e-3);
    EXPECT_LE(error.p99, 0.025);
    EXPECT_NEAR(error.fraction, 1, 1e-9);
  }
}

TEST(DenseTraceTest, Fp8PagesAreAsLossyAsTheFormat) {
  EXPECT_NEAR(RunTrace(kQwen, PageFormat::kF8E4m3, DecisionParams()).mean, 0.107, 0.005);
  EXPECT_NEAR(RunTrace(kSmol, PageFormat::kF8E4m3, DecisionParams()).mean, 0.0585, 0.003);
}

struct LadderCase {
  const char* path;
  float theta;
  int32_t coarse_rank;
  double error;
  double fraction;
};

class LadderTraceTest : public ::testing::TestWithParam<LadderCase> {};

TEST_P(LadderTraceTest, StaysBelowErrorAndBytes) {
  const LadderCase& c = GetParam();
  const TraceError error =
      RunTrace(c.path, PageFormat::kProgressiveF16, Ladder(c.theta, c.coarse_rank));
  EXPECT_LE(error.mean, c.error);
  EXPECT_LE(error.fraction, c.fraction);
}

INSTANTIATE_TEST_SUITE_P(Acceptance, LadderTraceTest,
                         ::testing::Values(LadderCase{kQwen, 0.004f, 0, 0.032, 0.180},
                                           LadderCase{kSmol, 0.004f, 0, 0.025, 0.177},
                                           LadderCase{kQwen, 0.004f, 64, 0.032, 0.163},
                                           LadderCase{kSmol, 0.004f, 32, 0.025, 0.152},
                                           LadderCase{kQwen, 0.0005f, 0, 0.012, 0.236},
                                           LadderCase{kSmol, 0.0005f, 0, 0.010, 0.236}));

std::unique_ptr<Backend> TestBackendOf(int64_t pool_bytes) { return MakeTestBackend(pool_bytes); }

// The budget against what a BF16 cache answers, as an audit with an exact tier does: the mean error
// of the head-steps lies between a quarter and nine tenths of the target, and few exceed it.
class BudgetTraceTest : public ::testing::TestWithParam<const char*> {
 protected:
  // Mean errors of at least `least` of their target.
  void MeetTargets(Policy policy, double least);
};

void BudgetTraceTest::MeetTargets(Policy policy, double least) {
  const absl::StatusOr<Trace> trace = LoadTrace(GetParam());
  ASSERT_TRUE(trace.ok()) << trace.status();
  auto steps = HeadStepTrace::Make(&*trace, TestBackendOf);
  ASSERT_TRUE(steps.ok()) << steps.status();
  double last_bytes = 1;
  for (const float target : {0.02f, 0.05f, 0.1f}) {
    DecisionParams params;
    params.policy = policy;
    params.target_relative_error = target;
    const auto run = steps->Run(params);
    ASSERT_TRUE(run.ok()) << run.status();
    const HeadStepSummary summary = steps->Summarise(*run, target);
    std::printf(
        "%s %.2f: kv heads mean %.4f above %.3f; q heads mean %.4f above %.3f; bytes %.4f\n",
        PolicyName(policy), target, summary.mean_error, summary.above, summary.mean_q_error,
        summary.q_above, summary.bytes);
    EXPECT_GE(summary.mean_error, least * target);
    EXPECT_LE(summary.mean_error, 0.9 * target);
    EXPECT_LE(summary.above, 0.03);
    EXPECT_GE(summary.mean_q_error, least * target);
    EXPECT_LE(summary.mean_q_error, 0.9 * target);
    EXPECT_LE(summary.q_above, 0.08);
    EXPECT_LT(summary.bytes, last_bytes);
    last_bytes = summary.bytes;
  }
}

TEST_P(BudgetTraceTest, MeetsItsTarget) { MeetTargets(Policy::kBudget, 0.25); }

// The captured rows lie a hundred tokens apart: harder to follow than one after the other, so that
// it stays further below.
TEST_P(BudgetTraceTest, MeetsItsTargetByFeedback) { MeetTargets(Policy::kFeedback, 0.2); }

TEST_P(BudgetTraceTest, FallsBackBelowWhatSealedDataCanGive) {
  const absl::StatusOr<Trace> trace = LoadTrace(GetParam());
  ASSERT_TRUE(trace.ok()) << trace.status();
  auto steps = HeadStepTrace::Make(&*trace, TestBackendOf);
  ASSERT_TRUE(steps.ok()) << steps.status();
  DecisionParams params;
  params.policy = Policy::kBudget;
  params.target_relative_error = 1e-4f;
  DecisionParams full;
  full.policy = Policy::kFullDepth;
  const auto tight = steps->Run(params), deep = steps->Run(full);
  ASSERT_TRUE(tight.ok() && deep.ok());
  EXPECT_EQ(steps->Summarise(*tight, 1e-4).fallbacks, 1);
  for (size_t i = 0; i < tight->size(); ++i) {
    EXPECT_NEAR((*tight)[i].error, (*deep)[i].error, 1e-6 + 0.01 * (*deep)[i].error);
    EXPECT_GT((*tight)[i].decision.predicted_error, 1e-4f) << "the reply must say that it misses";
  }
}

INSTANTIATE_TEST_SUITE_P(Traces, BudgetTraceTest, ::testing::Values(kQwen, kSmol));

TEST(FullDepthTraceTest, HasTheErrorOfEightBits) {
  DecisionParams params;
  params.policy = Policy::kFullDepth;
  for (const char* path : {kQwen, kSmol}) {
    EXPECT_LE(RunTrace(path, PageFormat::kProgressiveF16, params).mean, 0.012);
  }
}

}  // namespace
}  // namespace adaattn

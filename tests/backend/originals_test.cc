// What benchmarks make of a trace to time steps that read originals.

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "loadtest/originals_case.h"
#include "loadtest/row_judge.h"
#include "tests/backend/bound_judge.h"
#include "tests/support/test_backend.h"

namespace adaattn {
namespace {

constexpr int32_t kSequences = 2, kTokens = 2048;

class OriginalsTest : public testing::Test {
 protected:
  void SetUp() override {
    auto trace = LoadTrace("data/smollm2-135m-layer15-8k.safetensors");
    ASSERT_TRUE(trace.ok()) << trace.status();
    trace_ = *std::move(trace);
    const auto create = [](const BackendOptions& options) {
      std::string note;
      return CreateBackend(TestBackend(), options, &note);
    };
    auto made = OriginalsCase::Create(create, &trace_, 8, kSequences);
    ASSERT_TRUE(made.ok()) << made.status();
    case_ = *std::move(made);
    const absl::Status filled = case_->Fill(kSequences, kTokens);
    ASSERT_TRUE(filled.ok()) << filled;
  }

  // Its output, [sequences, q heads, head_dim].
  std::vector<float> Run(const absl::StatusOr<OriginalsStep>& step) {
    EXPECT_TRUE(step.ok()) << step.status();
    if (!step.ok()) return {};
    const absl::Status status = case_->Run(*step);
    EXPECT_TRUE(status.ok()) << status;
    const HeadDecision* decisions = step->batch.buffers->decisions();
    decisions_.assign(decisions, decisions + kSequences * trace_.shape.num_kv_heads);
    const auto* out = reinterpret_cast<const float*>(step->batch.buffers->out());
    return {out, out + int64_t{kSequences} * trace_.shape.num_q_heads * trace_.shape.head_dim};
  }

  Trace trace_;
  std::unique_ptr<OriginalsCase> case_;
  std::vector<HeadDecision> decisions_;  // of the last run
};

TEST_F(OriginalsTest, ExactStepsAnswerRightFromPoolAndTier) {
  const std::vector<float> pool = Run(case_->Exact(Originals::kPool));
  EXPECT_EQ(Run(case_->Exact(Originals::kTier)), pool);
  const AttentionShape& shape = trace_.shape;
  for (const HeadDecision& decision : decisions_) {
    EXPECT_EQ(decision.key_bytes + decision.value_bytes, int64_t{kTokens} * shape.head_dim * 4);
  }
  ASSERT_NE(case_->row(0), case_->row(1));
  RowJudge judge(&trace_);
  for (int32_t sequence = 0; sequence < kSequences; ++sequence) {
    for (int32_t head = 0; head < shape.num_q_heads; ++head) {
      const auto answers = judge.Judge({{case_->row(sequence), head, kTokens}});
      const int64_t at = (int64_t{sequence} * shape.num_q_heads + head) * shape.head_dim;
      EXPECT_LT(RelativeError(pool.data() + at, answers[0]->out), 5e-3) << sequence << " " << head;
    }
  }
}

TEST_F(OriginalsTest, BoundedStepsReadTheOriginalsThatTheyAreGiven) {
  SKIP_WITHOUT_BOUNDS();
  const std::vector<float> pool = Run(case_->Bounded(Originals::kPool, 0.02f));
  EXPECT_EQ(Run(case_->Bounded(Originals::kTier, 0.02f)), pool);
  for (const HeadDecision& decision : decisions_) {
    EXPECT_LE(decision.error_bound, 0.02f);
    EXPECT_GT(decision.exact_pages, 0);
    EXPECT_LE(decision.exact_pages, case_->num_sealed_pages());
  }
  Run(case_->Bounded(Originals::kNone, 0.02f));
  for (const HeadDecision& decision : decisions_) EXPECT_EQ(decision.exact_pages, 0);
}

TEST_F(OriginalsTest, RefusesWhatItCannotHold) {
  for (const auto& [sequences, tokens] :
       {std::make_pair(kSequences + 1, kTokens), {1, kPageTokens}, {1, 8193}, {0, kTokens}}) {
    EXPECT_EQ(case_->Fill(sequences, tokens).code(), absl::StatusCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace adaattn

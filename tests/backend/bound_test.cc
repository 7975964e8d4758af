// Bounded steps: met wherever the originals are kept, said where not, and counted to the byte.

#include <gtest/gtest.h>

#include <cmath>
#include <utility>
#include <vector>

#include "kernels/reference/attention_f64.h"
#include "loadtest/trace_cache.h"
#include "tests/backend/bound_judge.h"
#include "tests/backend/progressive_harness.h"

namespace adaattn {
namespace {

ProgressiveOptions SmallOptions(bool keep_exact) {
  ProgressiveOptions options;
  options.shape = {4, 2, 64};
  options.keep_exact = keep_exact;
  return options;
}

TEST(BoundTest, OriginalsMakeItHold) {
  SKIP_WITHOUT_BOUNDS();
  ProgressiveHarness cache(SmallOptions(/*keep_exact=*/true));
  Tally tally;
  for (const float target : {0.3f, 0.1f, 0.03f, 0.01f}) {
    StepCase step = cache.NewStep(2);
    step.decision = Bounded(target);
    const StepOutput output = cache.harness().Run({step})[0];
    JudgeStep(cache.harness().options().shape, step, output, &tally);
    for (const HeadDecision& decision : output.decisions) {
      EXPECT_LE(decision.error_bound, target);
      EXPECT_EQ(decision.predicted_error, 0) << "a bounded step predicts nothing";
    }
  }
  EXPECT_EQ(tally.met, tally.kv_heads);
  EXPECT_GT(tally.exact_pages, 0);
}

TEST(BoundTest, ReadsOriginalsInTheTierAsThoseInThePool) {
  SKIP_WITHOUT_BOUNDS();
  std::vector<std::vector<float>> outs;
  for (const int32_t num_tier_pages : {0, 16}) {
    ProgressiveOptions options = SmallOptions(/*keep_exact=*/true);
    options.num_tier_pages = num_tier_pages;
    ProgressiveHarness cache(options);
    StepCase step = cache.NewStep(2);
    step.decision = Bounded(0.03f);
    const StepOutput output = cache.harness().Run({step})[0];
    EXPECT_GT(output.decisions[0].exact_pages, 0);
    Tally tally;
    JudgeStep(cache.harness().options().shape, step, output, &tally);
    outs.push_back(output.out);
  }
  EXPECT_EQ(outs[0], outs[1]);
}

TEST(BoundTest, WithoutOriginalsAnUnmetTargetIsSaid) {
  SKIP_WITHOUT_BOUNDS();
  for (const int32_t stored_bits : {8, 6, 4}) {
    ProgressiveOptions options = SmallOptions(/*keep_exact=*/false);
    options.stored_bits = stored_bits;
    ProgressiveHarness cache(options);
    StepCase step = cache.NewStep(1);
    step.decision = Bounded(0.001f);
    const StepOutput output = cache.harness().Run({step})[0];
    for (const HeadDecision& decision : output.decisions) {
      EXPECT_EQ(decision.bound_depth, BoundDepth::kUnmet);
      EXPECT_GT(decision.error_bound, 0.001f);
      EXPECT_EQ(decision.key_pages[KeyDepthIndex(stored_bits, 4)],
                cache.sequence().num_sealed_pages)
          << "everything stored was read";
    }
  }
}

TEST(BoundTest, CountsTheBytesOfEveryDepth) {
  SKIP_WITHOUT_BOUNDS();
  ProgressiveHarness cache(SmallOptions(/*keep_exact=*/true));
  int32_t depths = 0;
  for (const float target : {1.0f, 0.5f, 0.05f, 1e-9f}) {
    StepCase step = cache.NewStep(1);
    for (float& value : step.q) value *= 0.05f;
    step.decision = Bounded(target);
    const StepOutput output = cache.harness().Run({step})[0];
    for (const HeadDecision& decision : output.decisions) {
      depths |= 1 << static_cast<int32_t>(decision.bound_depth);
      if (decision.bound_depth == BoundDepth::kUnmet) continue;  // It may have read again.
      const ReadBytes recount = RecountBytes(decision, 64, DType::kBf16);
      EXPECT_EQ(decision.key_bytes, recount.key);
      EXPECT_EQ(decision.value_bytes, recount.value);
    }
  }
  EXPECT_NE(depths & 1 << static_cast<int32_t>(BoundDepth::kUnmet), 0);
  EXPECT_NE(depths & 1 << static_cast<int32_t>(BoundDepth::kExactPages), 0);
}

TEST(BoundTest, DensePagesAreBoundedByTheirArithmetic) {
  SKIP_WITHOUT_BOUNDS();
  for (const PageFormat format :
       {PageFormat::kF32, PageFormat::kF16, PageFormat::kBf16, PageFormat::kF8E4m3}) {
    HarnessOptions options;
    options.shape = {4, 2, 128};
    options.format = format;
    BackendHarness harness(options);
    TestSequence sequence = harness.NewSequence(333);
    StepCase step;
    step.sequence = &sequence;
    step.q_len = 3;
    step.decision = Bounded(1e-2f);
    const StepOutput output = harness.Run({step})[0];
    Tally tally;
    JudgeStep(options.shape, step, output, &tally);
    EXPECT_EQ(tally.met, 2) << PageFormatName(format);
  }
}

TEST(BoundTest, SaysNothingOfOtherSteps) {
  ProgressiveHarness cache(SmallOptions(/*keep_exact=*/true));
  StepCase step = cache.NewStep(1);
  step.decision.policy = Policy::kBudget;
  const std::vector<StepOutput> outputs = cache.harness().Run({step});
  for (const HeadDecision& decision : outputs[0].decisions) {
    EXPECT_EQ(decision.error_bound, 0);
    EXPECT_EQ(decision.lse_below, 0);
    EXPECT_EQ(decision.exact_pages, 0);
    EXPECT_GT(decision.predicted_error, 0);
  }
}

// Truth from the tokens as the cache was given them, in BF16.
class TraceTruth {
 public:
  explicit TraceTruth(const Trace& trace) : trace_(trace) {
    const AttentionShape& shape = trace.shape;
    for (const auto& [from, to] : {std::make_pair(&trace.k, &k_), std::make_pair(&trace.v, &v_)}) {
      for (int64_t t = 0; t < trace.num_tokens; ++t) {
        for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
          for (int32_t c = 0; c < shape.head_dim; ++c) {
            const int64_t at = (head * trace.num_tokens + t) * shape.head_dim + c;
            to->push_back(RoundTo(DType::kBf16, ToFloat(Fp16{(*from)[at]})));
          }
        }
      }
    }
  }
  AttentionF64Result Row(int32_t row) const {
    const AttentionShape& shape = trace_.shape;
    std::vector<float> q;
    for (int32_t head = 0; head < shape.num_q_heads; ++head) {
      for (int32_t c = 0; c < shape.head_dim; ++c) {
        const int64_t at = (int64_t{head} * trace_.num_rows + row) * shape.head_dim + c;
        q.push_back(ToFloat(Fp16{trace_.q[at]}));
      }
    }
    AttentionF64Params params;
    params.shape = shape;
    params.kv_len = trace_.positions[row] + 1;
    params.q_len = 1;
    params.q_start = trace_.positions[row];
    params.softmax_scale = static_cast<float>(trace_.softmax_scale);
    return AttentionF64(params, q.data(), k_.data(), v_.data());
  }

 private:
  const Trace& trace_;
  std::vector<float> k_, v_;
};

TEST(BoundTest, HoldsAndIsMetOnTraces) {
  SKIP_WITHOUT_BOUNDS();
  const int32_t every = HeadStepsToTry() > kShortHeadSteps ? 1 : 4;  // rows of the trace
  for (const char* path : {"data/qwen25-coder-1.5b-layer14-8k.safetensors",
                           "data/smollm2-135m-layer15-8k.safetensors"}) {
    const absl::StatusOr<Trace> trace = LoadTrace(path);
    ASSERT_TRUE(trace.ok()) << trace.status();
    const auto backend =
        MakeTestBackend(TraceCache::PoolBytes(*trace, PageFormat::kProgressive, 8));
    const auto cache = TraceCache::Make(backend.get(), &*trace, PageFormat::kProgressive, 8);
    ASSERT_TRUE(cache.ok()) << cache.status();
    const TraceTruth truth(*trace);
    for (const float target : {0.1f, 0.02f}) {
      Tally tally;
      for (int32_t row = 0; row < trace->num_rows; row += every) {
        const auto results = (*cache)->Attend({(*cache)->Step(row, Bounded(target))}, {row});
        ASSERT_TRUE(results.ok()) << results.status();
        const AttentionF64Result expected = truth.Row(row);
        const int32_t d = trace->shape.head_dim;
        for (int32_t head = 0; head < trace->shape.num_q_heads; ++head) {
          Judge(&(*results)[0].out[head * d], (*results)[0].lse[head], &expected.out[head * d],
                expected.lse[head], d, (*results)[0].decisions[head / trace->shape.group_size()],
                &tally);
        }
        for (const HeadDecision& decision : (*results)[0].decisions) {
          CountHead(decision, target, &tally);
        }
      }
      tally.Print(path);
      EXPECT_EQ(tally.violations, 0);
      EXPECT_EQ(tally.met, tally.kv_heads);
    }
  }
}

}  // namespace
}  // namespace adaattn

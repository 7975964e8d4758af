// Bounded steps against float64 attention over the original tokens: the bound holds, always, and is
// met wherever the originals are kept. ADAATTN_BOUND_HEAD_STEPS sets how many (q head, row) outputs
// the random part tries; `make bound-check` tries a million.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "kernels/reference/attention_f64.h"
#include "loadtest/trace_cache.h"
#include "tests/backend/progressive_harness.h"

namespace adaattn {
namespace {

constexpr int64_t kShortHeadSteps = 4000;

int64_t HeadStepsToTry() {
  const char* const text = std::getenv("ADAATTN_BOUND_HEAD_STEPS");
  return text == nullptr ? kShortHeadSteps : std::atoll(text);
}

// What many outputs came to.
struct Tally {
  int64_t head_steps = 0;
  int64_t violations = 0;
  int64_t finite = 0;  // bounds
  int64_t met = 0;     // kv heads
  int64_t kv_heads = 0;
  double tightest = 0;  // largest actual over bound
  int64_t exact_pages = 0, sealed_pages = 0;

  void Print(const char* name) const {
    std::printf(
        "%s: %lld head-steps, %lld violations, bound finite in %.1f %%, target met in "
        "%.1f %% of kv heads, actual / bound at most %.3f, originals of %.1f %% of pages\n",
        name, static_cast<long long>(head_steps), static_cast<long long>(violations),
        100.0 * static_cast<double>(finite) / static_cast<double>(head_steps),
        100.0 * static_cast<double>(met) / static_cast<double>(kv_heads), tightest,
        100.0 * static_cast<double>(exact_pages) /
            static_cast<double>(std::max<int64_t>(sealed_pages, 1)));
  }
};

// One output against the truth under its kv head's decision.
void Judge(const float* out, float lse, const double* truth, double true_lse, int32_t head_dim,
           const HeadDecision& decision, Tally* tally) {
  ++tally->head_steps;
  if (std::isinf(true_lse)) return;
  double error = 0, norm = 0;
  for (int32_t c = 0; c < head_dim; ++c) {
    error += std::pow(out[c] - truth[c], 2);
    norm += truth[c] * truth[c];
  }
  const double actual = norm > 0 ? std::sqrt(error / norm) : 0.0;
  const bool bad = !(actual <= decision.error_bound) || true_lse < lse - decision.lse_below ||
                   true_lse > lse + decision.lse_above;
  if (bad) {
    ++tally->violations;
    ADD_FAILURE() << "actual " << actual << " bound " << decision.error_bound << ", lse " << lse
                  << " true " << true_lse << " -" << decision.lse_below << " +"
                  << decision.lse_above;
  }
  if (!std::isinf(decision.error_bound)) {
    ++tally->finite;
    tally->tightest = std::max(tally->tightest, actual / decision.error_bound);
  }
}

void CountHead(const HeadDecision& decision, float target, Tally* tally) {
  ++tally->kv_heads;
  tally->met += decision.error_bound <= target ? 1 : 0;
  tally->exact_pages += decision.exact_pages;
  for (const int32_t pages : decision.value_pages) tally->sealed_pages += pages;
  EXPECT_EQ(decision.error_bound <= target, decision.bound_depth != BoundDepth::kUnmet);
}

AttentionF64Result TruthOf(const AttentionShape& shape, const StepCase& step,
                           const StepOutput& output) {
  AttentionF64Params params;
  params.shape = shape;
  params.kv_len = step.sequence->length;
  params.q_len = step.q_len;
  params.q_start = step.q_start >= 0 ? step.q_start : step.sequence->length - step.q_len;
  params.softmax_scale = step.softmax_scale > 0
                             ? step.softmax_scale
                             : 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  params.softcap = step.softcap;
  params.window = step.window;
  return AttentionF64(params, output.q.data(), step.sequence->k.data(), step.sequence->v.data());
}

void JudgeStep(const AttentionShape& shape, const StepCase& step, const StepOutput& output,
               Tally* tally) {
  const AttentionF64Result truth = TruthOf(shape, step, output);
  for (size_t row = 0; row < truth.lse.size(); ++row) {
    const auto q_head = static_cast<int32_t>(row % shape.num_q_heads);
    const size_t at = row * shape.head_dim;
    Judge(&output.out[at], output.lse[row], &truth.out[at], truth.lse[row], shape.head_dim,
          output.decisions[q_head / shape.group_size()], tally);
  }
  for (const HeadDecision& decision : output.decisions) {
    CountHead(decision, step.decision.target_relative_error, tally);
  }
}

DecisionParams Bounded(float target) {
  DecisionParams params;
  params.policy = Policy::kBudget;
  params.bounded = true;
  params.target_relative_error = target;
  return params;
}

ProgressiveOptions SmallOptions(bool keep_exact) {
  ProgressiveOptions options;
  options.shape = {4, 2, 64};
  options.keep_exact = keep_exact;
  return options;
}

bool Supported() {
  const auto backend = MakeTestBackend(1 << 20);
  return backend != nullptr && backend->info().bounds_errors;
}

#define SKIP_WITHOUT_BOUNDS() \
  if (!Supported()) GTEST_SKIP() << "the backend does not bound errors"

// Caches, queries and targets of every kind.
ProgressiveOptions RandomOptions(std::mt19937* random) {
  const auto pick = [random](int32_t count) { return static_cast<int32_t>((*random)() % count); };
  constexpr int32_t kDims[] = {64, 80, 96, 128};
  constexpr DType kOutTypes[] = {DType::kF32, DType::kBf16, DType::kF16};
  ProgressiveOptions options;
  const int32_t kv_heads = 1 + pick(2);
  options.shape = {kv_heads * (1 + pick(4)), kv_heads, kDims[pick(4)]};
  options.length = 256 + pick(500);
  options.stored_bits = 4 + 2 * pick(3);
  options.num_bases = 1 + pick(2);
  options.seed = static_cast<uint32_t>((*random)());
  options.keep_exact = pick(4) != 0;
  options.out_type = kOutTypes[pick(3)];
  options.num_threads = 1;
  return options;
}

StepCase RandomStep(ProgressiveHarness* cache, std::mt19937* random) {
  const auto pick = [random](int32_t count) { return static_cast<int32_t>((*random)() % count); };
  StepCase step = cache->NewStep(1 + pick(8));
  // From flat attention to a single token.
  const float sharpness = std::exp2(static_cast<float>(pick(9) - 6));
  for (float& value : step.q) value *= sharpness;
  if (pick(4) == 0) step.window = 64 + pick(300);
  if (pick(4) == 0) step.softcap = static_cast<float>(5 + pick(50));
  step.decision = Bounded(std::exp2(-static_cast<float>(pick(12))));
  if (pick(3) == 0) {
    step.decision.policy = Policy::kThreshold;
    step.decision.theta = std::exp2(-static_cast<float>(2 + pick(10)));
  }
  return step;
}

TEST(BoundTest, IsNeverViolatedOnRandomInputs) {
  SKIP_WITHOUT_BOUNDS();
  const int64_t wanted = HeadStepsToTry();
  std::mt19937 random(20);
  Tally tally;
  while (tally.head_steps < wanted && !::testing::Test::HasFailure()) {
    const ProgressiveOptions options = RandomOptions(&random);
    ProgressiveHarness cache(options);
    ASSERT_TRUE(cache.harness().ok());
    for (int i = 0; i < 24 && tally.head_steps < wanted; ++i) {
      const StepCase step = RandomStep(&cache, &random);
      JudgeStep(options.shape, step, cache.harness().Run({step})[0], &tally);
    }
  }
  tally.Print("random");
  EXPECT_EQ(tally.violations, 0);
  EXPECT_GT(tally.tightest, 0.01) << "a bound this loose says nothing";
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
  constexpr int32_t kEvery = 4;  // rows of the trace
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
      for (int32_t row = 0; row < trace->num_rows; row += kEvery) {
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

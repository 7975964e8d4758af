#ifndef ADAATTN_TESTS_BACKEND_BOUND_JUDGE_H_
#define ADAATTN_TESTS_BACKEND_BOUND_JUDGE_H_

// Bounded steps held against float64 attention over the original tokens.

#include <cstdint>

#include "kernels/attention.h"
#include "tests/backend/backend_harness.h"

namespace adaattn {

// How many (q head, row) outputs to try: ADAATTN_BOUND_HEAD_STEPS, or these.
inline constexpr int64_t kShortHeadSteps = 4000;
int64_t HeadStepsToTry();

// What many outputs came to.
struct Tally {
  int64_t head_steps = 0;
  int64_t violations = 0;
  int64_t finite = 0;  // bounds
  int64_t met = 0;     // kv heads
  int64_t kv_heads = 0;
  double tightest = 0;  // largest actual over bound
  int64_t exact_pages = 0, sealed_pages = 0;
  int64_t one_token = 0, outliers = 0;  // head-steps with those

  void Add(const Tally& other);
  void Print(const char* name) const;
};

// One output against the truth under its kv head's decision.
void Judge(const float* out, float lse, const double* truth, double true_lse, int32_t head_dim,
           const HeadDecision& decision, Tally* tally);

void CountHead(const HeadDecision& decision, float target, Tally* tally);

// All outputs and kv heads of a step.
void JudgeStep(const AttentionShape& shape, const StepCase& step, const StepOutput& output,
               Tally* tally);

DecisionParams Bounded(float target);

// Whether the backend under test bounds errors.
bool BoundsErrors();

#define SKIP_WITHOUT_BOUNDS() \
  if (!BoundsErrors()) GTEST_SKIP() << "the backend does not bound errors"

}  // namespace adaattn

#endif  // ADAATTN_TESTS_BACKEND_BOUND_JUDGE_H_

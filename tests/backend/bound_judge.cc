#include "tests/backend/bound_judge.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "kernels/reference/attention_f64.h"

namespace adaattn {
namespace {

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

}  // namespace

int64_t HeadStepsToTry() {
  const char* const text = std::getenv("ADAATTN_BOUND_HEAD_STEPS");
  return text == nullptr ? kShortHeadSteps : std::atoll(text);
}

void Tally::Add(const Tally& other) {
  head_steps += other.head_steps;
  violations += other.violations;
  finite += other.finite;
  met += other.met;
  kv_heads += other.kv_heads;
  tightest = std::max(tightest, other.tightest);
  exact_pages += other.exact_pages;
  sealed_pages += other.sealed_pages;
  one_token += other.one_token;
  outliers += other.outliers;
}

void Tally::Print(const char* name) const {
  std::printf(
      "%s: %lld head-steps (%lld aimed at one token, %lld with an outlier channel), %lld "
      "violations, bound finite in %.1f %%, target met in %.1f %% of kv heads, actual / bound at "
      "most %.3f, originals of %.1f %% of pages\n",
      name, static_cast<long long>(head_steps), static_cast<long long>(one_token),
      static_cast<long long>(outliers), static_cast<long long>(violations),
      100.0 * static_cast<double>(finite) / static_cast<double>(head_steps),
      100.0 * static_cast<double>(met) / static_cast<double>(kv_heads), tightest,
      100.0 * static_cast<double>(exact_pages) /
          static_cast<double>(std::max<int64_t>(sealed_pages, 1)));
}

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

bool BoundsErrors() {
  const auto backend = MakeTestBackend(1 << 20);
  return backend != nullptr && backend->info().bounds_errors;
}

}  // namespace adaattn

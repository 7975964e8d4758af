#include "tests/backend/progressive_harness.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <utility>

#include "kernels/format/basis.h"
#include "kernels/policy/ladder.h"
#include "kernels/policy/value_factors.h"

namespace adaattn {
namespace {

HarnessOptions BackendOptionsFor(const ProgressiveOptions& options) {
  HarnessOptions out;
  out.shape = options.shape;
  out.format = options.format;
  out.num_pages = options.num_pages;
  out.num_tier_pages = options.num_tier_pages;
  out.num_threads = options.num_threads;
  out.seed = options.seed;
  out.out_type = options.out_type;
  return out;
}

// One kv head's rows of [tokens, num_kv_heads, head_dim].
std::vector<float> HeadRows(const std::vector<float>& rows, const AttentionShape& shape,
                            int32_t kv_head, int64_t begin, int64_t end) {
  std::vector<float> out;
  for (int64_t t = begin; t < end; ++t) {
    const auto at = rows.begin() + (t * shape.num_kv_heads + kv_head) * shape.head_dim;
    out.insert(out.end(), at, at + shape.head_dim);
  }
  return out;
}

// How far theta may be off, relative: entropy and learned theta come from sums of exponentials, the
// others are of a grid.
double ThetaError(const SealedLimits& limits, Policy policy) {
  return policy > Policy::kBudget ? limits.theta : 1e-6;
}

// Pages that a rounding of their share may put on either side of a threshold.
int32_t PagesNearThresholds(const ProgressiveResultF64& reference, double window) {
  int32_t near = 0;
  for (const double share : reference.shares) {
    for (const double multiple : {1.0, 4.0, 16.0, 64.0}) {
      near += std::abs(share / (multiple * reference.decision.theta) - 1) < window ? 1 : 0;
    }
  }
  return near;
}

int32_t CountDifference(const int32_t* a, const int32_t* b, int32_t size) {
  int32_t difference = 0;
  for (int32_t i = 0; i < size; ++i) difference += std::abs(a[i] - b[i]);
  return difference / 2;
}

bool SameDepths(const HeadDecision& a, const HeadDecision& b) {
  return CountDifference(a.value_pages, b.value_pages, kNumValueDepths) == 0 &&
         CountDifference(a.key_pages, b.key_pages, kNumKeyDepths) == 0;
}

}  // namespace

ProgressiveHarness::ProgressiveHarness(const ProgressiveOptions& options)
    : options_(options), harness_(BackendOptionsFor(options)) {
  if (!harness_.ok()) return;
  sequence_.stored_bits = options.stored_bits;
  sequence_.keep_exact = options.keep_exact;
  const int32_t heads = options.shape.num_kv_heads;
  // Drawn one after the other: the order of arguments is the compiler's.
  std::vector<float> values = harness_.RandomRows(options.length, heads);
  std::vector<float> keys = StructuredRows(options.length, heads, true);
  const int32_t d = options.shape.head_dim;
  for (int64_t i = 0; i < options.length * heads; ++i) {
    values[i * d + d / 3] *= options.outlier;
    keys[i * d + d / 2] *= options.outlier;
  }
  if (options.repeat > 0) RepeatOneToken(&keys, &values);
  harness_.AppendTokens(&sequence_, keys, values);
  const int32_t sealed = static_cast<int32_t>(options.length / kPageTokens) - 1;
  for (int32_t run = 0; run < options.num_bases; ++run) {
    const int32_t begin = sealed * run / options.num_bases;
    const int32_t end = sealed * (run + 1) / options.num_bases;
    SealRun(begin, end - begin);
  }
}

std::vector<float> ProgressiveHarness::StructuredRows(int64_t rows, int32_t heads, bool keys) {
  const int32_t d = options_.shape.head_dim;
  std::vector<float> values = harness_.RandomRows(rows, heads);
  std::vector<float> drift;
  for (int64_t i = 0; i < rows * heads; ++i) {
    if (keys && i % (int64_t{kPageTokens} * heads) == 0) drift = harness_.RandomRows(heads, 1);
    for (int32_t c = 0; c < d; ++c) {
      float& value = values[i * d + c];
      // Energy falls with a channel's number, scattered so that the basis has something to find.
      const float scale = 2.0f / (1.0f + static_cast<float>((c * 37) % d) / 6.0f);
      if (keys) value = value * 0.5f + drift[(i % heads) * d + c];
      value *= scale;
      if (keys) value += c % 5 == 0 ? 3.0f : -0.5f;
    }
  }
  return values;
}

void ProgressiveHarness::RepeatOneToken(std::vector<float>* keys, std::vector<float>* values) {
  const int32_t size = options_.shape.num_kv_heads * options_.shape.head_dim;
  repeated_keys_ = StructuredRows(1, options_.shape.num_kv_heads, false);
  for (float& x : repeated_keys_) x *= 2.0f;
  const std::vector<float> value = harness_.RandomRows(1, options_.shape.num_kv_heads);
  for (int64_t t = 3; t < options_.length; t += options_.repeat) {
    std::copy_n(repeated_keys_.begin(), size, keys->begin() + t * size);
    std::copy_n(value.begin(), size, values->begin() + t * size);
  }
}

PageId ProgressiveHarness::FitBasis(int32_t count) {
  const AttentionShape& shape = options_.shape;
  const int32_t group = shape.group_size(), d = shape.head_dim;
  const std::vector<float> sample = NewStep(options_.sample_rows).q;
  for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
    const int64_t tokens = int64_t{count} * kPageTokens;
    const std::vector<float> keys = HeadRows(sequence_.k, shape, head, 0, tokens);
    const std::vector<float> values = HeadRows(sequence_.v, shape, head, 0, tokens);
    std::vector<float> queries;
    for (int32_t row = 0; row < options_.sample_rows; ++row) {
      const auto at = sample.begin() + (int64_t{row} * shape.num_q_heads + head * group) * d;
      queries.insert(queries.end(), at, at + int64_t{group} * d);
    }
    absl::StatusOr<Basis> basis = adaattn::FitBasis(d, keys, queries);
    EXPECT_TRUE(basis.ok()) << basis.status();
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    basis->value_factors = Scaled(MeasureValueFactors({d, group, scale, 0, keys, values, queries}),
                                  HeadFactor(options_.error_factors, head));
    WriteBasis(*basis, shape, head, basis_blocks_.back().data());
  }
  return harness_.FitBasis(sequence_, count, sample, options_.error_factors);
}

PageId ProgressiveHarness::BringBasis(int32_t first_page, int32_t count) {
  const AttentionShape& shape = options_.shape;
  std::vector<float> means, rotations;
  for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
    const std::vector<float> keys =
        HeadRows(sequence_.k, shape, head, int64_t{first_page} * kPageTokens,
                 int64_t{first_page + count} * kPageTokens);
    absl::StatusOr<Basis> basis = adaattn::FitBasis(shape.head_dim, keys, {});
    EXPECT_TRUE(basis.ok()) << basis.status();
    basis->value_factors = Scaled({}, HeadFactor(options_.error_factors, head));
    WriteBasis(*basis, shape, head, basis_blocks_.back().data());
    means.insert(means.end(), basis->mean.begin(), basis->mean.end());
    rotations.insert(rotations.end(), basis->rotation.begin(), basis->rotation.end());
  }
  LoadBasisTask load;
  load.shape = shape;
  load.mean = means;
  load.basis = rotations;
  load.error_factors = options_.error_factors;
  load.target = harness_.NewPage();
  EXPECT_TRUE(harness_.backend().LoadBasis(load).ok());
  return load.target;
}

void ProgressiveHarness::SealRun(int32_t first_page, int32_t count) {
  const AttentionShape& shape = options_.shape;
  basis_blocks_.emplace_back(MakeBasisLayout(shape).block_bytes);
  harness_.SealWith(&sequence_, count,
                    options_.sample_rows > 0 ? FitBasis(count) : BringBasis(first_page, count));
  for (int32_t page = first_page; page < first_page + count; ++page) {
    pages_.emplace_back(MakePageLayout(shape, options_.stored_bits).page_bytes);
    page_bases_.push_back(static_cast<int32_t>(basis_blocks_.size()) - 1);
    for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
      const int64_t begin = int64_t{page} * kPageTokens;
      SealedHead sealed{shape.head_dim, head, MakePageLayout(shape, options_.stored_bits),
                        TileOrder::kLanes};
      SealHead(sealed, ViewBasis(basis_blocks_.back().data(), shape, head),
               HeadRows(sequence_.k, shape, head, begin, begin + kPageTokens).data(),
               HeadRows(sequence_.v, shape, head, begin, begin + kPageTokens).data(),
               pages_.back().data());
    }
  }
}

StepCase ProgressiveHarness::NewStep(int32_t q_len) {
  StepCase step;
  step.sequence = &sequence_;
  step.q_len = q_len;
  step.q = StructuredRows(q_len, options_.shape.num_q_heads, false);
  const int32_t d = options_.shape.head_dim;
  for (size_t i = 0; !repeated_keys_.empty() && i < step.q.size(); ++i) {
    const size_t head = i / d % options_.shape.num_q_heads / options_.shape.group_size();
    step.q[i] = 0.3f * step.q[i] + 0.5f * repeated_keys_[head * d + i % d];
  }
  return step;
}

ProgressiveResultF64 ProgressiveHarness::Reference(const StepCase& step, const StepOutput& output,
                                                   int32_t kv_head) {
  const AttentionShape& shape = options_.shape;
  ProgressiveHeadF64 head(SealedHead{
      shape.head_dim, kv_head, MakePageLayout(shape, options_.stored_bits), TileOrder::kLanes});
  for (size_t page = 0; page < pages_.size(); ++page) {
    head.AddPage(ViewBasis(basis_blocks_[page_bases_[page]].data(), shape, kv_head),
                 pages_[page].data());
  }
  const int32_t group = shape.group_size(), d = shape.head_dim;
  std::vector<float> q;
  for (int32_t i = 0; i < step.q_len; ++i) {
    const auto at = output.q.begin() + (int64_t{i} * shape.num_q_heads + kv_head * group) * d;
    q.insert(q.end(), at, at + int64_t{group} * d);
  }
  const int64_t sealed = int64_t{sequence_.num_sealed_pages} * kPageTokens;
  const std::vector<float> keys = HeadRows(sequence_.k, shape, kv_head, sealed, sequence_.length);
  const std::vector<float> values = HeadRows(sequence_.v, shape, kv_head, sealed, sequence_.length);
  ProgressiveStepF64 reference;
  reference.q = q.data();
  reference.q_len = step.q_len;
  reference.group_size = group;
  reference.q_start = step.q_start >= 0 ? step.q_start : sequence_.length - step.q_len;
  reference.num_sealed_pages = sequence_.num_sealed_pages;
  reference.num_dense_tokens = sequence_.length - sealed;
  reference.dense_keys = keys.data();
  reference.dense_values = values.data();
  reference.softmax_scale =
      step.softmax_scale > 0 ? step.softmax_scale : 1.0f / std::sqrt(static_cast<float>(d));
  reference.softcap = step.softcap;
  reference.window = step.window;
  reference.decision = step.decision;
  if (!step.thetas.empty()) reference.decision.theta = step.thetas[kv_head];
  return head.Run(reference);
}

ProgressiveResultF64 ProgressiveHarness::ReferenceNear(const StepCase& step,
                                                       const StepOutput& output, int32_t kv_head) {
  constexpr int kThetas = 8;  // on either side
  const HeadDecision& actual = output.decisions[kv_head];
  StepCase near = step;
  near.decision.policy = Policy::kThreshold;
  near.thetas.clear();
  ProgressiveResultF64 result;
  for (int i = 0; i <= 2 * kThetas; ++i) {
    const int steps = i % 2 == 0 ? i / 2 : -(i + 1) / 2;
    const double moved = harness_.sealed_limits().share * steps / kThetas;
    near.decision.theta = static_cast<float>(actual.theta * (1 + moved));
    result = Reference(near, output, kv_head);
    if (SameDepths(result.decision, actual)) break;
  }
  return result;
}

void ProgressiveHarness::CompareHead(const StepCase& step, const StepOutput& output,
                                     int32_t kv_head) {
  SCOPED_TRACE("kv head " + std::to_string(kv_head));
  ProgressiveResultF64 expected = Reference(step, output, kv_head);
  const HeadDecision& actual = output.decisions[kv_head];
  const SealedLimits limits = harness_.sealed_limits();
  const double theta_error = ThetaError(limits, step.decision.policy);
  const int32_t near = PagesNearThresholds(expected, limits.share + theta_error);
  EXPECT_LE(CountDifference(actual.value_pages, expected.decision.value_pages, kNumValueDepths),
            near)
      << "pages by value depth";
  EXPECT_LE(CountDifference(actual.key_pages, expected.decision.key_pages, kNumKeyDepths), near);
  EXPECT_EQ(actual.dense_tokens, expected.decision.dense_tokens);
  const bool any_page = std::any_of(std::begin(actual.value_pages), std::end(actual.value_pages),
                                    [](int32_t pages) { return pages > 0; });
  const float theta = any_page ? expected.decision.theta : 0.0f;
  EXPECT_NEAR(actual.theta, theta, theta_error * theta);
  // What follows from the depths is judged at those of the backend.
  if (near > 0 && !SameDepths(actual, expected.decision)) {
    expected = ReferenceNear(step, output, kv_head);
  }
  const bool same = SameDepths(actual, expected.decision);
  EXPECT_NEAR(actual.entropy, expected.decision.entropy, limits.entropy);
  const bool reads_on =
      step.decision.policy == Policy::kStatic && step.decision.static_key_bits > kScanBits;
  const double predicted = reads_on ? limits.static_predicted : limits.predicted;
  EXPECT_NEAR(actual.predicted_error, expected.decision.predicted_error,
              (same ? predicted : 0.5) * expected.decision.predicted_error + 1e-6);
  const ReadBytes recount = RecountBytes(actual, options_.shape.head_dim, DType::kBf16);
  EXPECT_EQ(actual.key_bytes, recount.key);
  EXPECT_EQ(actual.value_bytes, recount.value);
  EXPECT_EQ(actual.basis_bytes, expected.decision.basis_bytes);

  const int32_t group = options_.shape.group_size(), d = options_.shape.head_dim;
  for (int32_t row = 0; row < step.q_len * group; ++row) {
    const int64_t at =
        int64_t{row / group} * options_.shape.num_q_heads + kv_head * group + row % group;
    if (std::isinf(expected.lse[row])) {
      EXPECT_EQ(output.lse[at], expected.lse[row]) << "row " << row;
      continue;
    }
    double error = 0, norm = 0;
    for (int32_t c = 0; c < d; ++c) {
      const double want = expected.out[int64_t{row} * d + c];
      error += std::pow(output.out[at * d + c] - want, 2);
      norm += want * want;
    }
    // Of another depth as much as it takes.
    EXPECT_LE(std::sqrt(error / norm), same ? limits.error.out : 0.05) << "row " << row;
    EXPECT_NEAR(output.lse[at], expected.lse[row], same ? limits.error.lse : 0.02) << "row " << row;
  }
}

StepOutput ProgressiveHarness::RunAndCompare(const StepCase& step) {
  StepOutput output = harness_.Run({step})[0];
  for (int32_t head = 0; head < options_.shape.num_kv_heads; ++head) {
    CompareHead(step, output, head);
  }
  return output;
}

}  // namespace adaattn

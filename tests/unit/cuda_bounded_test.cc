// Bounded steps of the CUDA backend, run by threads of the host: the algorithm is the device's own
// (kernels/cuda/bounded_head.h).

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/bounded_head.h"
#include "kernels/format/basis.h"
#include "kernels/format/seal.h"
#include "kernels/reference/attention_f64.h"
#include "tests/unit/host_team.h"

namespace adaattn {
namespace {

struct CacheOptions {
  AttentionShape shape{4, 2, 64};
  DType page_type = DType::kBf16;
  int32_t length = 600;
  bool sealed = true;  // all but the last full page and the open one
  int32_t stored_bits = 8;
  int32_t num_bases = 1;
  bool keep_exact = true;
  float outlier = 1;
  uint32_t seed = 5;
};

// A cache as the device holds it, and the tokens that it was given.
class Cache {
 public:
  explicit Cache(const CacheOptions& options) : options_(options), random_(options.seed) {
    const AttentionShape& shape = options.shape;
    k_ = Rows(options.length, shape.num_kv_heads, true);
    v_ = Rows(options.length, shape.num_kv_heads, false);
    const int32_t num_pages = (options.length + kPageTokens - 1) / kPageTokens;
    slot_ = std::max({DensePageBytes(shape, options.page_type), MakePageLayout(shape, 8).page_bytes,
                      MakeBasisLayout(shape).block_bytes});
    pool_.resize((2 * num_pages + options.num_bases) * slot_ / 8);
    for (int32_t page = 0; page < num_pages; ++page) WriteDense(page);
    for (int32_t page = 0; page < num_pages; ++page) table_.push_back(Id(page));
    if (options.sealed) Seal(num_pages);
  }

  BoundedSequence NewStep(int32_t q_len) {
    BoundedSequence step = sequence_;
    step.kv_len = options_.length;
    step.q_len = q_len;
    step.q_start = options_.length - q_len;
    step.softmax_scale = 1 / std::sqrt(static_cast<float>(options_.shape.head_dim));
    step.stored_bits = options_.stored_bits;
    step.decision.policy = Policy::kBudget;
    step.decision.bounded = true;
    q_ = Rows(q_len, options_.shape.num_q_heads, false);
    return step;
  }
  std::vector<float>& q() { return q_; }
  const std::vector<float>& k() const { return k_; }

  // Runs the step and holds every output against float64; returns the decisions.
  std::vector<HeadDecision> RunAndJudge(const BoundedSequence& step, DType out_type = DType::kF32) {
    const AttentionShape& shape = options_.shape;
    BoundedParams params;
    params.shape = shape;
    params.num_sequences = 1;
    params.max_q_len = step.q_len;
    params.max_pages = static_cast<int32_t>(table_.size());
    params.in_type = DType::kF32;
    params.out_type = out_type;
    params.page_type = options_.page_type;
    params.memory.pool = reinterpret_cast<std::byte*>(pool_.data());
    params.sequences = &step;
    params.table = table_.data();
    params.q = reinterpret_cast<const std::byte*>(q_.data());
    std::vector<float> out(q_.size()), lse(step.q_len * shape.num_q_heads);
    params.out = reinterpret_cast<std::byte*>(out.data());
    params.lse = lse.data();
    std::vector<HeadDecision> decisions(shape.num_kv_heads, HeadDecision{});
    params.decisions = decisions.data();
    std::vector<double> workspace(BoundedWorkspaceBytes(params) / 8, std::nan(""));
    params.workspace = reinterpret_cast<std::byte*>(workspace.data());
    for (int32_t head = 0; head < shape.num_kv_heads; ++head) RunHead(params, 0, head);
    Judge(step, out_type, out, lse, decisions);
    return decisions;
  }

  double tightest = 0;  // largest actual error over its bound

 private:
  std::vector<float> Rows(int32_t rows, int32_t heads, bool keys) {
    std::normal_distribution<float> normal;
    const int32_t d = options_.shape.head_dim;
    std::vector<float> values(int64_t{rows} * heads * d), drift(int64_t{heads} * d);
    for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
      const int64_t c = i % d, head = i / d % heads, token = i / d / heads;
      if (keys && token % kPageTokens == 0) drift[head * d + c] = normal(random_);
      float x = normal(random_);
      if (keys) x = (0.5f * x + drift[head * d + c]) * 2 / (1 + static_cast<float>(c * 37 % d) / 6);
      if (keys) x += c % 5 == 0 ? 3.0f : -0.5f;
      if (keys && c == d / 2) x *= options_.outlier;
      values[i] = Rounded(x);
    }
    return values;
  }
  float Rounded(float x) const {
    float stored = 0;
    WriteElement(&stored, options_.page_type, 0, x);
    return ReadElement(&stored, options_.page_type, 0);
  }
  uint32_t Id(int64_t slot) const { return static_cast<uint32_t>(slot * slot_ / kPageAlignment); }
  std::byte* Slot(int64_t slot) {
    return reinterpret_cast<std::byte*>(pool_.data()) + slot * slot_;
  }
  std::vector<float> HeadRows(const std::vector<float>& rows, int32_t head, int32_t begin,
                              int32_t end) const {
    std::vector<float> out;
    const int32_t d = options_.shape.head_dim;
    for (int32_t token = begin; token < end; ++token) {
      const auto at = rows.begin() + (int64_t{token} * options_.shape.num_kv_heads + head) * d;
      out.insert(out.end(), at, at + d);
    }
    return out;
  }
  // What no token has written is NaN.
  void WriteDense(int32_t page) {
    std::memset(Slot(page), 0xff, static_cast<size_t>(slot_));
    const int32_t begin = page * kPageTokens, end = std::min(begin + kPageTokens, options_.length);
    for (int32_t head = 0; head < options_.shape.num_kv_heads; ++head) {
      const std::vector<float> keys = HeadRows(k_, head, begin, end);
      const std::vector<float> values = HeadRows(v_, head, begin, end);
      const DType type = options_.page_type;
      for (size_t i = 0; i < keys.size(); ++i) {
        const auto at = static_cast<int64_t>(i);
        WriteElement(Slot(page) + DenseKeyOffset(head, options_.shape.head_dim, type), type, at,
                     keys[i]);
        WriteElement(Slot(page) + DenseValueOffset(options_.shape, head, type), type, at,
                     values[i]);
      }
    }
  }
  void Seal(int32_t num_pages) {
    const AttentionShape& shape = options_.shape;
    const int32_t sealed = options_.length / kPageTokens - 1;
    sequence_.num_sealed = sealed;
    sequence_.num_bases = options_.num_bases;
    if (options_.keep_exact) sequence_.exact_begin = num_pages;
    for (int32_t page = 0; page < sealed; ++page) table_.push_back(Id(page));
    for (int32_t run = 0; run < options_.num_bases; ++run) {
      const int32_t begin = sealed * run / options_.num_bases;
      const int32_t end = sealed * (run + 1) / options_.num_bases;
      std::byte* block = Slot(2 * num_pages + run);
      sequence_.basis_end[run] = end;
      sequence_.basis[run] = PageId{Id(2 * num_pages + run)};
      for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
        const std::vector<float> keys = HeadRows(k_, head, begin * kPageTokens, end * kPageTokens);
        WriteBasis(*FitBasis(shape.head_dim, keys, {}), shape, head, block);
        for (int32_t page = begin; page < end; ++page) {
          const SealedHead to{shape.head_dim, head, MakePageLayout(shape, options_.stored_bits),
                              TileOrder::kMma};
          const int32_t first = page * kPageTokens, last = first + kPageTokens;
          SealHead(to, ViewBasis(block, shape, head), HeadRows(k_, head, first, last).data(),
                   HeadRows(v_, head, first, last).data(), Slot(num_pages + page));
          table_[page] = Id(num_pages + page);
        }
      }
    }
  }

  void Judge(const BoundedSequence& step, DType out_type, const std::vector<float>& out,
             const std::vector<float>& lse, const std::vector<HeadDecision>& decisions) {
    AttentionF64Params params;
    params.shape = options_.shape;
    params.kv_len = options_.length;
    params.q_len = step.q_len;
    params.q_start = step.q_start;
    params.softmax_scale = step.softmax_scale;
    params.softcap = step.softcap;
    params.window = step.window;
    const AttentionF64Result truth = AttentionF64(params, q_.data(), k_.data(), v_.data());
    const int32_t d = options_.shape.head_dim;
    for (size_t row = 0; row < lse.size(); ++row) {
      const HeadDecision& decision =
          decisions[row % options_.shape.num_q_heads / options_.shape.group_size()];
      double error = 0, norm = 0;
      for (int32_t c = 0; c < d; ++c) {
        const auto at = static_cast<int64_t>(row) * d + c;
        error += std::pow(ReadElement(out.data(), out_type, at) - truth.out[at], 2);
        norm += std::pow(truth.out[at], 2);
      }
      const double actual = norm > 0 ? std::sqrt(error / norm) : 0;
      EXPECT_LE(actual, decision.error_bound) << "row " << row;
      if (std::isinf(truth.lse[row])) {
        EXPECT_EQ(lse[row], truth.lse[row]);
        continue;
      }
      EXPECT_GE(truth.lse[row], lse[row] - decision.lse_below);
      EXPECT_LE(truth.lse[row], lse[row] + decision.lse_above);
      if (!std::isinf(decision.error_bound)) {
        tightest = std::max(tightest, actual / decision.error_bound);
      }
    }
    for (const HeadDecision& decision : decisions) {
      EXPECT_EQ(decision.error_bound <= step.decision.target_relative_error,
                decision.bound_depth != BoundDepth::kUnmet);
      EXPECT_EQ(decision.predicted_error, 0);
    }
  }

  const CacheOptions options_;
  std::mt19937 random_;
  int64_t slot_ = 0;
  std::vector<double> pool_;
  std::vector<uint32_t> table_;
  std::vector<float> k_, v_, q_;
  BoundedSequence sequence_;
};

TEST(CudaBoundedTest, OriginalsMakeTheBoundHold) {
  Cache cache({});
  int32_t exact_pages = 0;
  for (const float target : {0.3f, 0.1f, 0.03f, 0.01f}) {
    BoundedSequence step = cache.NewStep(2);
    step.decision.target_relative_error = target;
    for (const HeadDecision& decision : cache.RunAndJudge(step)) {
      EXPECT_LE(decision.error_bound, target);
      exact_pages += decision.exact_pages;
    }
  }
  EXPECT_GT(exact_pages, 0);
}

TEST(CudaBoundedTest, WithoutOriginalsEverythingStoredIsReadAndAnUnmetTargetSaid) {
  for (const int32_t stored_bits : {8, 6, 4}) {
    CacheOptions options;
    options.stored_bits = stored_bits;
    options.keep_exact = false;
    Cache cache(options);
    BoundedSequence step = cache.NewStep(1);
    step.decision.target_relative_error = 0.001f;
    for (const HeadDecision& decision : cache.RunAndJudge(step)) {
      EXPECT_EQ(decision.bound_depth, BoundDepth::kUnmet);
      EXPECT_EQ(decision.key_pages[KeyDepthIndex(stored_bits, 4)], 8);
    }
  }
}

TEST(CudaBoundedTest, CountsTheBytesOfEveryDepth) {
  Cache cache({});
  int32_t depths = 0;
  for (const float target : {1.0f, 0.5f, 0.05f, 1e-9f}) {
    BoundedSequence step = cache.NewStep(1);
    for (float& x : cache.q()) x *= 0.05f;
    step.decision.target_relative_error = target;
    for (const HeadDecision& decision : cache.RunAndJudge(step)) {
      depths |= 1 << static_cast<int32_t>(decision.bound_depth);
      if (decision.bound_depth == BoundDepth::kUnmet) continue;  // It may have read again.
      const ReadBytes recount = RecountBytes(decision, 64, DType::kBf16);
      EXPECT_EQ(decision.key_bytes, recount.key);
      EXPECT_EQ(decision.value_bytes, recount.value);
      EXPECT_EQ(decision.basis_bytes, BasisReadBytes(64));
    }
  }
  EXPECT_NE(depths & 1 << static_cast<int32_t>(BoundDepth::kUnmet), 0);
  EXPECT_NE(depths & 1 << static_cast<int32_t>(BoundDepth::kExactPages), 0);
}

TEST(CudaBoundedTest, DensePagesAreBoundedByTheirArithmetic) {
  for (const DType type : {DType::kF32, DType::kF16, DType::kBf16, DType::kF8E4m3}) {
    CacheOptions options;
    options.shape = {4, 2, 128};
    options.page_type = type;
    options.length = 333;
    options.sealed = false;
    Cache cache(options);
    BoundedSequence step = cache.NewStep(3);
    step.decision.target_relative_error = 1e-2f;
    for (const HeadDecision& decision : cache.RunAndJudge(step)) {
      EXPECT_LE(decision.error_bound, 1e-2f) << DTypeName(type);
      EXPECT_EQ(decision.dense_tokens, 333);
    }
  }
}

// With 4 bits of a key that an outlier widens, a page may seem to have e^1000 of its mass: what is
// kept relative to that is lost.
TEST(CudaBoundedTest, KeepsDenseTokensWhereTheScanOverestimates) {
  for (const float outlier : {256.0f, 2048.0f}) {
    for (const float sharpness : {1.0f, 16.0f, 256.0f}) {
      CacheOptions options;
      options.outlier = outlier;
      Cache cache(options);
      const BoundedSequence step = cache.NewStep(4);
      for (float& x : cache.q()) x *= sharpness;
      cache.RunAndJudge(step);
    }
  }
}

// A row of shapes, depths, masks, policies and targets.
TEST(CudaBoundedTest, IsNeverViolatedOnRandomInputs) {
  std::mt19937 random(11);
  const auto pick = [&random](int32_t count) { return static_cast<int32_t>(random() % count); };
  constexpr int32_t kDims[] = {64, 80, 96, 128};
  constexpr DType kOutTypes[] = {DType::kF32, DType::kBf16, DType::kF16};
  constexpr Policy kPolicies[] = {Policy::kBudget, Policy::kThreshold, Policy::kEntropy,
                                  Policy::kFullDepth};
  double tightest = 0;
  for (int32_t round = 0; round < 12; ++round) {
    CacheOptions options;
    const int32_t kv_heads = 1 + pick(2);
    options.shape = {kv_heads * (1 + pick(4)), kv_heads, kDims[pick(4)]};
    options.page_type = pick(2) == 0 ? DType::kBf16 : DType::kF16;
    options.length = 256 + pick(500);
    options.stored_bits = 4 + 2 * pick(3);
    options.num_bases = 1 + pick(2);
    options.keep_exact = pick(4) != 0;
    options.outlier = pick(4) == 0 ? std::exp2(static_cast<float>(1 + pick(8))) : 1.0f;
    options.seed = static_cast<uint32_t>(random());
    Cache cache(options);
    for (int32_t i = 0; i < 6; ++i) {
      SCOPED_TRACE(std::to_string(round) + "." + std::to_string(i));
      BoundedSequence step = cache.NewStep(1 + pick(8));
      const float sharpness = std::exp2(static_cast<float>(pick(9) - 6));
      for (float& x : cache.q()) x *= sharpness;
      if (pick(4) == 0) {  // aimed at one token
        const auto token = static_cast<int64_t>(pick(options.length));
        for (size_t j = 0; j < cache.q().size(); ++j) {
          const int64_t q_head = j / options.shape.head_dim % options.shape.num_q_heads;
          const int64_t kv_head = q_head / options.shape.group_size();
          cache.q()[j] += cache.k()[(token * kv_heads + kv_head) * options.shape.head_dim +
                                    j % options.shape.head_dim];
        }
      }
      if (pick(4) == 0) step.window = 64 + pick(300);
      if (pick(4) == 0) step.softcap = static_cast<float>(5 + pick(50));
      step.decision.policy = kPolicies[pick(4)];
      step.decision.theta = std::exp2(-static_cast<float>(2 + pick(10)));
      step.decision.target_relative_error = std::exp2(-static_cast<float>(pick(12)));
      cache.RunAndJudge(step, kOutTypes[pick(3)]);
    }
    tightest = std::max(tightest, cache.tightest);
  }
  EXPECT_GT(tightest, 0.01) << "a bound this loose says nothing";
}

}  // namespace
}  // namespace adaattn

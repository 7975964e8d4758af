#include "kernels/reference/progressive_f64.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/format/hadamard.h"
#include "kernels/policy/entropy.h"
#include "kernels/reference/progressive_step_f64.h"

namespace adaattn {
namespace internal {

StepRun::StepRun(const ProgressiveHeadF64& cache, const ProgressiveStepF64& step)
    : cache_(cache),
      step_(step),
      d_(cache.head().head_dim),
      stored_bits_(cache.head().layout.stored_bits),
      rows_(static_cast<size_t>(step.q_len) * step.group_size) {
  const auto pages = static_cast<size_t>(step.num_sealed_pages);
  result_.out.assign(rows_.size() * d_, 0.0);
  result_.lse.assign(rows_.size(), kNoMass);
  result_.predicted.assign(rows_.size(), 0.0);
  result_.shares.assign(pages, 0.0);
  result_.depths.assign(pages, PageDepth{});
  for (size_t row = 0; row < rows_.size(); ++row) PrepareRow(static_cast<int32_t>(row));
  FindVisiblePages();
  Select();
  Predict();
  for (size_t row = 0; row < rows_.size(); ++row) Attend(static_cast<int32_t>(row));
  Report();
}

ProgressiveResultF64 StepRun::Take() { return std::move(result_); }

void StepRun::PrepareRow(int32_t index) {
  Row& row = rows_[static_cast<size_t>(index)];
  const float* const q = step_.q + int64_t{index} * d_;
  const int64_t sealed_tokens = int64_t{num_pages()} * kPageTokens;
  row.visible = VisibleTokens(step_.q_start + index / step_.group_size,
                              sealed_tokens + step_.num_dense_tokens, step_.window);
  for (const ProgressiveHeadF64::HeldBasis& basis : cache_.bases()) {
    std::vector<double> rotated(static_cast<size_t>(d_), 0.0);
    double mean_score = 0.0;
    for (int32_t c = 0; c < d_; ++c) {
      mean_score += q[c] * basis.mean[static_cast<size_t>(c)];
      for (int32_t r = 0; r < d_; ++r) {
        rotated[static_cast<size_t>(r)] += q[c] * basis.rotation[static_cast<size_t>(c) * d_ + r];
      }
    }
    row.query.push_back(std::move(rotated));
    row.mean_score.push_back(mean_score);
  }
  row.dense_begin = std::max(int64_t{0}, row.visible.begin - sealed_tokens);
  for (int64_t t = row.dense_begin; t < row.visible.end - sealed_tokens; ++t) {
    double dot = 0.0;
    for (int32_t c = 0; c < d_; ++c) dot += double{q[c]} * step_.dense_keys[t * d_ + c];
    row.dense_scores.push_back(CappedScore(step_.softmax_scale * dot, step_.softcap));
  }
}

bool StepRun::Sees(const Row& row, int32_t page) const {
  const int64_t first = int64_t{page} * kPageTokens;
  return std::max(first, row.visible.begin) < std::min(first + kPageTokens, row.visible.end);
}

void StepRun::FindVisiblePages() {
  visible_.assign(static_cast<size_t>(num_pages()), false);
  facts_.assign(static_cast<size_t>(num_pages()), PageFacts{});
  for (int32_t p = 0; p < num_pages(); ++p) {
    facts_[static_cast<size_t>(p)].sink = p == 0;
    const int64_t first = int64_t{p} * kPageTokens;
    for (const Row& row : rows_) {
      if (!Sees(row, p)) continue;
      visible_[static_cast<size_t>(p)] = true;
      if (row.visible.begin > first || row.visible.end < first + kPageTokens) {
        facts_[static_cast<size_t>(p)].cut = true;
      }
    }
  }
}

void StepRun::Attend(int32_t index) {
  const Row& row = rows_[static_cast<size_t>(index)];
  if (row.visible.begin >= row.visible.end) return;
  std::vector<double> logs = row.dense_scores;
  std::vector<std::vector<double>> scores(static_cast<size_t>(num_pages()));
  for (int32_t p = 0; p < num_pages(); ++p) {
    if (!Sees(row, p)) continue;
    std::vector<double>& mine = scores[static_cast<size_t>(p)];
    const PageDepth at = depth(p);
    mine = at.value_bits == 0 ? std::vector<double>{row.log_mass[static_cast<size_t>(p)]}
                              : Scores(row, p, at.key.bits, ChunkedRank(d_, at.key.chunks));
    logs.insert(logs.end(), mine.begin(), mine.end());
  }
  const double lse = LogSumExp(logs);
  double* const out = result_.out.data() + int64_t{index} * d_;
  for (int32_t p = 0; p < num_pages(); ++p) {
    const std::vector<double>& mine = scores[static_cast<size_t>(p)];
    const int64_t first = int64_t{p} * kPageTokens;
    const int64_t skip = std::max(first, row.visible.begin) - first;
    for (size_t i = 0; i < mine.size(); ++i) {
      const double weight = std::exp(mine[i] - lse);
      const float* const value =
          page(p).values[depth(p).value_bits / 2].data() + (skip + static_cast<int64_t>(i)) * d_;
      for (int32_t c = 0; c < d_; ++c) out[c] += weight * value[c];
    }
  }
  RotateHadamard(out, d_);
  for (size_t i = 0; i < row.dense_scores.size(); ++i) {
    const double weight = std::exp(row.dense_scores[i] - lse);
    const float* const value =
        step_.dense_values + (row.dense_begin + static_cast<int64_t>(i)) * d_;
    for (int32_t c = 0; c < d_; ++c) out[c] += weight * value[c];
  }
  result_.lse[static_cast<size_t>(index)] = lse;
}

void StepRun::Report() {
  HeadDecision& decision = result_.decision;
  size_t last_basis = cache_.bases().size();
  for (int32_t p = 0; p < num_pages(); ++p) {
    if (!visible_[static_cast<size_t>(p)]) continue;
    const PageDepth at = depth(p);
    ++decision.key_pages[KeyDepthIndex(at.key.bits, at.key.chunks)];
    ++decision.value_pages[at.value_bits / 2];
    if (page(p).basis != last_basis) decision.basis_bytes += BasisReadBytes(d_);
    last_basis = page(p).basis;
  }
  if (rows_.empty()) return;
  const int64_t sealed_tokens = int64_t{num_pages()} * kPageTokens;
  const int64_t dense_end = rows_.back().visible.end - sealed_tokens;
  decision.dense_tokens =
      static_cast<int32_t>(std::max(int64_t{0}, dense_end - rows_.front().dense_begin));
  double entropy = 0.0;
  for (const Row& row : rows_) {
    std::vector<double> items = row.log_mass;
    items.insert(items.end(), row.dense_scores.begin(), row.dense_scores.end());
    entropy += Entropy(items);
  }
  decision.entropy = static_cast<float>(entropy / static_cast<double>(rows_.size()));
  const ReadBytes bytes = RecountBytes(decision, d_, DType::kBf16);
  decision.key_bytes = bytes.key;
  decision.value_bytes = bytes.value;
}

}  // namespace internal

void ProgressiveHeadF64::AddPage(const BasisView& basis, const std::byte* page) {
  const int32_t d = head_.head_dim;
  const auto elements = static_cast<size_t>(kPageTokens) * d;
  size_t held = 0;
  while (held < bases_.size() && bases_[held].identity != basis.mean) ++held;
  if (held == bases_.size()) {
    HeldBasis copy;
    copy.identity = basis.mean;
    copy.mean.assign(basis.mean, basis.mean + d);
    for (int64_t i = 0; i < int64_t{d} * d; ++i) {
      copy.rotation.push_back(ToFloat(basis.query_basis[i]));
    }
    bases_.push_back(std::move(copy));
  }
  Page decoded;
  decoded.basis = held;
  for (int32_t bits = 4; bits <= head_.layout.stored_bits; bits += 2) {
    std::vector<float>& keys = decoded.keys[bits / 2 - 2];
    keys.resize(elements);
    DecodeRotatedKeys(head_, page, bits, head_.layout.num_chunks, keys.data());
  }
  for (int32_t bits = 0; bits <= head_.layout.stored_bits; bits += 2) {
    decoded.values[bits / 2].resize(elements);
    DecodeRotatedValues(head_, page, bits, decoded.values[bits / 2].data());
  }
  const uint8_t* const scales = KeyScales(head_, page);
  decoded.key_scales.assign(scales, scales + d);
  decoded.summary = ReadValueSummary(head_, page);
  std::vector<float> first(static_cast<size_t>(d));
  decoded.first_scale_rms =
      DecodeFirstRotatedValue(head_, page, head_.layout.stored_bits, first.data());
  pages_.push_back(std::move(decoded));
}

ProgressiveResultF64 ProgressiveHeadF64::Run(const ProgressiveStepF64& step) const {
  return internal::StepRun(*this, step).Take();
}

}  // namespace adaattn

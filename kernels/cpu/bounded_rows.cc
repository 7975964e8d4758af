// The bound of each row of a bounded head: from partial results to terms to figures.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/cpu/bounded.h"
#include "kernels/cpu/bounded_arithmetic.h"
#include "kernels/format/hadamard.h"

namespace adaattn {
namespace {

constexpr double kNegativeInfinity = -std::numeric_limits<double>::infinity();
constexpr double kTheRest = -1;  // of the mass

double Norm(const double* x, int32_t count) {
  return std::sqrt(std::inner_product(x, x + count, x, 0.0));
}

// One row of a head's partial results together: o in the model's frame, and its lse.
double MergedOutput(const HeadJob& head, int32_t row, int32_t head_dim, std::vector<double>* o) {
  double max = kNegativeInfinity, sum = 0;
  for (int32_t i = 0; i < head.num_splits; ++i) {
    max = std::max(max, double{head.splits[i].rows.max[row]});
  }
  o->assign(static_cast<size_t>(head_dim), 0.0);
  if (max == kNegativeInfinity) return max;
  for (int32_t i = 0; i < head.num_splits; ++i) {
    const PartialRows& part = head.splits[i].rows;
    const double weight = std::exp(part.max[row] - max);
    sum += weight * part.sum[row];
    for (int32_t c = 0; c < head_dim; ++c) {
      (*o)[c] += weight * head.splits[i].factor * part.acc[int64_t{row} * head_dim + c];
    }
  }
  for (double& value : *o) value /= sum;
  return max + std::log(sum);
}

}  // namespace

BoundTerm BoundedHead::TermOf(int32_t row, double mass, const DenseExtent& extent,
                              double norm) const {
  // At least four lanes share a dot product.
  return DenseTerm(mass, head_dim_ / 4.0, query_norms_[row], extent.key, extent.value, norm,
                   head_->sequence->softmax_scale, head_->sequence->softcap);
}

void BoundedHead::AddSealedTerms(int32_t row, const double* rotated_o, double norm, double lse,
                                 std::vector<BoundTerm>* terms, double* rounding) const {
  for (int32_t page = 0; page < job_->num_pages; ++page) {
    if (exact(page)) continue;
    const double log_mass = job_->scans.log_mass[Cell(page, row)];
    const SealedPage view = JobPage(*job_, context_.pool, page);
    const PageMean mean = ViewPageMean(view);
    double squares = 0;
    for (int32_t c = 0; c < head_dim_; ++c) {
      const double off = double{mean.summary.mean_scale} * mean.mean[c] - rotated_o[c];
      squares += off * off;
    }
    SealedFacts facts;
    facts.mass = std::exp(log_mass - lse);
    facts.score_error = score_errors_[Cell(page, row)];
    facts.mean_shift = std::abs(log_mass - job_->scans.lse[Cell(page, row)]);
    facts.to_mean = std::sqrt(squares);
    facts.radius = double{mean.summary.radius} * (1 + kFrameError);
    facts.value_bits = job_->depths[page].value_bits;
    if (facts.value_bits > 0) {
      const ValueRanges ranges = SumValueRanges(view.value_scales(), head_dim_);
      facts.token_range = ranges.token;
      facts.saturated = ranges.saturated;
      *rounding += facts.mass * ranges.page * kPageTokens * kHalfStep;
    }
    terms->push_back(SealedTerm(facts, norm));
  }
}

BoundedHead::RowBound BoundedHead::BoundRow(int32_t row, const double* o, double lse,
                                            double exact_mass) const {
  const double norm = Norm(o, head_dim_);
  std::vector<BoundTerm> terms;
  double rounding = 0, sealed_mass = 0;
  if (job_ != nullptr) {
    std::vector<double> rotated(o, o + head_dim_);
    RotateHadamard(rotated.data(), head_dim_);
    AddSealedTerms(row, rotated.data(), norm, lse, &terms, &rounding);
    for (const BoundTerm& term : terms) sealed_mass += term.mass;
  }
  double dense_mass = 0;
  for (int32_t i = 0; i < dense_splits_; ++i) {
    const PartialRows& part = head_->splits[i].rows;
    if (part.sum[row] > 0) dense_mass += part.sum[row] * std::exp(double{part.max[row]} - lse);
  }
  terms.push_back(TermOf(row, dense_mass, dense_, norm));
  if (exact_mass < 0) exact_mass = std::max(0.0, 1 - dense_mass - sealed_mass);
  terms.push_back(TermOf(row, exact_mass, exact_, norm));
  double reach = 0;
  for (const BoundTerm& term : terms) {
    if (term.mass > 0) reach = std::max(reach, term.distance);
  }
  const int64_t pages = job_ == nullptr ? 0 : job_->num_pages;
  const int64_t dense_pages = (head_->dense_end - head_->dense_begin) / kPageTokens + 1;
  const int64_t chain = SplitPages(std::max(pages, dense_pages)) * kPageTokens + pages + 256;
  rounding += ValueSumError(static_cast<double>(chain), reach, norm);
  for (BoundTerm& term : terms) term.distance += rounding;
  const double error =
      OutputErrorBound(terms) + rounding + OutputRounding(batch_.out_type, norm, head_dim_);
  RowBound bound;
  bound.relative = RelativeBound(error, norm);
  bound.lse = BoundLse(terms);
  bound.lse.below += LseRounding(lse);
  bound.lse.above += LseRounding(lse);
  return bound;
}

double BoundedHead::Expected() const {
  double worst = 0;
  std::vector<double> o(head_dim_);
  for (int32_t row = 0; row < rows(); ++row) {
    if (job_->row_lse[row] == kNegativeInfinity) continue;
    std::copy_n(job_->estimate + int64_t{row} * head_dim_, head_dim_, o.begin());
    RotateHadamard(o.data(), head_dim_);
    worst = std::max(worst, BoundRow(row, o.data(), job_->row_lse[row], kTheRest).relative);
  }
  return worst;
}

double BoundedHead::ExactMass(int32_t row, double lse) const {
  if (head_->num_splits < dense_splits_ + 2) return 0;
  const PartialRows& part = head_->splits[dense_splits_ + 1].rows;
  return part.sum[row] > 0 ? part.sum[row] * std::exp(double{part.max[row]} - lse) : 0;
}

BoundedHead::RowBound BoundedHead::Measure() const {
  RowBound worst;
  std::vector<double> o;
  for (int32_t row = 0; row < rows(); ++row) {
    const double lse = MergedOutput(*head_, row, head_dim_, &o);
    if (lse == kNegativeInfinity) continue;
    const RowBound bound = BoundRow(row, o.data(), lse, ExactMass(row, lse));
    worst.relative = std::max(worst.relative, bound.relative);
    worst.lse.below = std::max(worst.lse.below, bound.lse.below);
    worst.lse.above = std::max(worst.lse.above, bound.lse.above);
  }
  return worst;
}

bool BoundedHead::Settle(SealedWorker* worker) {
  const RowBound bound = Measure();
  const int32_t num_splits = head_->num_splits;
  const bool met = bound.relative <= head_->sequence->decision.target_relative_error;
  if (!met && job_ != nullptr) {
    Restart();
    if (Deepen(worker)) {
      Plan(worker);
      return false;
    }
    head_->num_splits = num_splits;
  }
  Report(bound, met ? depth_ : BoundDepth::kUnmet);
  return true;
}

void BoundedHead::Report(const RowBound& bound, BoundDepth depth) {
  const auto up = [](double value) {
    return std::nextafter(static_cast<float>(value), std::numeric_limits<float>::infinity());
  };
  HeadDecision* const decision = head_->decision;
  decision->error_bound = bound.relative == 0 ? 0.0f : up(bound.relative);
  decision->lse_below = up(bound.lse.below);
  decision->lse_above = up(bound.lse.above);
  decision->bound_depth = depth;
  decision->predicted_error = 0;
  if (job_ == nullptr) return;
  std::fill_n(decision->key_pages, kNumKeyDepths, 0);
  std::fill_n(decision->value_pages, kNumValueDepths, 0);
  for (int32_t page = 0; page < job_->num_pages; ++page) {
    ++decision->key_pages[KeyDepthIndex(job_->raw_bits[page], job_->layout.num_chunks)];
    ++decision->value_pages[exact(page) ? 0 : job_->depths[page].value_bits / 2];
    decision->exact_pages += exact(page) ? 1 : 0;
  }
}

}  // namespace adaattn

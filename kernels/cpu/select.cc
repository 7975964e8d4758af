// From scans to depths: global LSE, shares, the policy, and what is reported of them.

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/sealed_job.h"
#include "kernels/format/hadamard.h"
#include "kernels/format/seal.h"
#include "kernels/policy/budget.h"
#include "kernels/policy/error_model.h"
#include "kernels/policy/theta.h"

namespace adaattn {
namespace {

// Summaries lie a page apart, where no prefetcher of the processor finds them.
constexpr int32_t kSummariesAhead = 12;
constexpr int32_t kCacheLine = 64;
constexpr int32_t kMeansAtOnce = 16;

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// One head's selection in flight.
class Selection {
 public:
  Selection(SealedJob* job, int32_t head_dim, int32_t group_size, const std::byte* pool)
      : job_(*job),
        rows_(job->head->rows),
        head_dim_(head_dim),
        group_(group_size),
        pool_(pool),
        shares_(int64_t{job->num_pages} * rows_),
        parts_(shares_.size()),
        estimates_(int64_t{rows_} * head_dim),
        norms_(rows_) {}

  void Run() {
    DecodeSink();
    Estimate();
    // A budget needs to know what every depth would cost before it can choose one.
    const bool budget = job_.ladder && job_.head->sequence->decision.policy == Policy::kBudget;
    if (budget) FillParts(/*all=*/true);
    const float theta = job_.ladder ? ChooseTheta() : 0.0f;
    job_.head->decision->theta = theta;
    for (int32_t page = 0; page < job_.num_pages; ++page) SelectPage(page, theta);
    if (!budget) FillParts(/*all=*/false);
    Report();
    if (job_.estimate != nullptr) {
      std::copy(estimates_.begin(), estimates_.end(), job_.estimate);
    }
  }

 private:
  const RowScan& scan(int32_t page, int32_t row) const {
    return job_.scans[int64_t{page} * rows_ + row];
  }

  // What stands for a page's values in estimates: its mean, or the sink's first token.
  bool FirstTokenStands(int32_t page, int32_t row) const {
    return FirstTokenStandsForPage(job_.facts[page].sink,
                                   job_.head->ranges[row / group_].begin == 0,
                                   scan(page, row).concentration);
  }
  void DecodeSink();
  void PrefetchMean(int32_t page) const;
  // o before attending, in the Hadamard frame: pages by what stands for them, dense tokens as they
  // are.
  void Estimate();
  void AddDense(int32_t row, float* o) const;
  float FirstTokenDistance2(const float* o) const;
  void FillDistances(int32_t page, float* distances) const;
  // What every page costs every row, with keys as the scan read them. Not `all`: of skipped pages
  // only what skipping costs.
  void FillParts(bool all);
  float ChooseTheta() const;
  float ChooseBudget() const;
  MassSums SumMasses() const;
  void SelectPage(int32_t page, float theta);
  void Report();
  float Entropy() const;

  SealedJob& job_;
  const int32_t rows_;
  const int32_t head_dim_;
  const int32_t group_;
  const std::byte* const pool_;
  std::vector<float> shares_;          // [num_pages, rows]
  std::vector<PageErrorParts> parts_;  // [num_pages, rows]; 0 where the row sees none of the page
  std::vector<float> estimates_;       // [rows, head_dim]
  std::vector<float> norms_;           // [rows] |o|^2
  std::vector<float> first_;           // [head_dim] the sink's first value, Hadamard frame
  float first_scale_rms_ = 0;
};

void Selection::DecodeSink() {
  if (job_.num_pages == 0 || !job_.facts[0].sink) return;
  const SequenceStep& sequence = *job_.head->sequence;
  const SealedHead head{head_dim_, job_.head->kv_head, job_.layout, kCpuTileOrder};
  const int32_t bits = job_.ladder ? sequence.stored_bits : job_.fixed.value_bits;
  first_.resize(head_dim_);
  first_scale_rms_ =
      DecodeFirstRotatedValue(head, pool_ + PageOffset(sequence.pages[0]), bits, first_.data());
}

void Selection::PrefetchMean(int32_t page) const {
  const PageMean mean = JobPageMean(job_, pool_, page);
  for (int32_t c = 0; c < head_dim_; c += kCacheLine) __builtin_prefetch(mean.mean + c);
  __builtin_prefetch(mean.mean + head_dim_ - 1);
}

void Selection::AddDense(int32_t row, float* o) const {
  const HeadJob& head = *job_.head;
  for (int32_t i = 0; i < head.num_splits; ++i) {
    const PartialRows& split = head.splits[i].rows;
    if (split.max[row] == kNegativeInfinity) continue;
    const float weight = std::exp(split.max[row] - job_.row_lse[row]) * head.splits[i].factor;
    AddScaled(split.acc + int64_t{row} * head_dim_, weight, head_dim_, o);
  }
  RotateHadamard(o, head_dim_);
}

float Selection::FirstTokenDistance2(const float* o) const {
  float sum = 0;
  for (int32_t c = 0; c < head_dim_; ++c) sum += (first_[c] - o[c]) * (first_[c] - o[c]);
  return sum;
}

void Selection::Estimate() {
  for (int32_t row = 0; row < rows_; ++row) {
    AddDense(row, estimates_.data() + int64_t{row} * head_dim_);
  }
  std::vector<float> scales(rows_);  // from masses to shares
  for (int32_t row = 0; row < rows_; ++row) {
    const bool any = job_.row_max[row] > kNegativeInfinity;
    scales[row] = any ? std::exp(job_.row_max[row] - job_.row_lse[row]) : 0.0f;
  }
  PageMean means[kMeansAtOnce];
  std::vector<float> weights(int64_t{kMeansAtOnce} * rows_);
  int32_t held = 0;
  for (int32_t page = 0; page < job_.num_pages; ++page) {
    if (page + kSummariesAhead < job_.num_pages) PrefetchMean(page + kSummariesAhead);
    means[held] = JobPageMean(job_, pool_, page);
    for (int32_t row = 0; row < rows_; ++row) {
      const int64_t at = int64_t{page} * rows_ + row;
      shares_[at] = job_.masses[at] * scales[row];
      const bool first = FirstTokenStands(page, row);
      weights[int64_t{held} * rows_ + row] = first ? 0.0f : shares_[at];
      if (first) {
        AddScaled(first_.data(), shares_[at], head_dim_,
                  estimates_.data() + int64_t{row} * head_dim_);
      }
    }
    if (++held < kMeansAtOnce && page + 1 < job_.num_pages) continue;
    AddValueMeans(means, held, head_dim_, weights.data(), rows_, estimates_.data());
    held = 0;
  }
  for (int32_t row = 0; row < rows_; ++row) {
    const float* o = estimates_.data() + int64_t{row} * head_dim_;
    for (int32_t c = 0; c < head_dim_; ++c) norms_[row] += o[c] * o[c];
  }
}

void Selection::FillDistances(int32_t page, float* distances) const {
  ValueMeanDistances(JobPageMean(job_, pool_, page), head_dim_, estimates_.data(), rows_,
                     distances);
  if (!job_.facts[page].sink) return;
  for (int32_t row = 0; row < rows_; ++row) {
    if (!FirstTokenStands(page, row)) continue;
    distances[row] = FirstTokenDistance2(estimates_.data() + int64_t{row} * head_dim_);
  }
}

void Selection::FillParts(bool all) {
  std::vector<float> distances(rows_);  // |mean - o|^2
  for (int32_t page = 0; page < job_.num_pages; ++page) {
    if (all || job_.depths[page].value_bits > 0) FillDistances(page, distances.data());
    const ValueSummary summary = JobPageMean(job_, pool_, page).summary;
    for (int32_t row = 0; row < rows_; ++row) {
      const int64_t at = int64_t{page} * rows_ + row;
      if (job_.scans[at].lse == kNegativeInfinity) continue;
      const bool first = FirstTokenStands(page, row);
      PageErrorInputs inputs;
      inputs.share = shares_[at];
      inputs.concentration = job_.scans[at].concentration;
      inputs.score_variance = job_.scans[at].variance;
      inputs.mean_distance2 = distances[row];
      inputs.spread = first ? 0.0f : summary.spread;
      inputs.scale_rms = first ? first_scale_rms_ : summary.scale_rms;
      parts_[at] = ErrorParts(inputs, head_dim_);
    }
  }
}

float Selection::ChooseTheta() const {
  const DecisionParams& params = job_.head->sequence->decision;
  switch (params.policy) {
    case Policy::kBudget:
      return ChooseBudget();
    case Policy::kEntropy:
    case Policy::kLearned:
      return ThetaFromMasses(params, SumMasses(), rows_, job_.num_pages);
    default:
      return params.theta;
  }
}

MassSums Selection::SumMasses() const {
  MassSums sums;
  for (int32_t row = 0; row < rows_; ++row) {
    if (job_.row_lse[row] == kNegativeInfinity) continue;
    MassSums own;
    for (int32_t page = 0; page < job_.num_pages; ++page) {
      const int64_t at = int64_t{page} * rows_ + row;
      AddPageMass(shares_[at], job_.scans[at].concentration, job_.scans[at].variance, &own);
    }
    AddDenseMass(1.0f - own.sealed, &own);
    AddMasses(own, &sums);
  }
  return sums;
}

float Selection::ChooseBudget() const {
  const SequenceStep& sequence = *job_.head->sequence;
  std::vector<float> weights(rows_);
  for (int32_t row = 0; row < rows_; ++row) {
    if (norms_[row] > 0) weights[row] = 1.0f / (norms_[row] * static_cast<float>(rows_));
  }
  std::vector<PageBudget> budgets(job_.num_pages);
  for (int32_t page = 0; page < job_.num_pages; ++page) {
    budgets[page].facts = job_.facts[page];
    for (int32_t row = 0; row < rows_; ++row) {
      const int64_t at = int64_t{page} * rows_ + row;
      AddToBudget(shares_[at], parts_[at], weights[row], &budgets[page]);
    }
  }
  return adaattn::ChooseTheta(sequence.decision, budgets, head_dim_, sequence.stored_bits).theta;
}

void Selection::SelectPage(int32_t page, float theta) {
  if (!job_.ladder) {
    job_.depths[page] = job_.fixed;
    return;
  }
  const SequenceStep& sequence = *job_.head->sequence;
  float share = 0;
  for (int32_t row = 0; row < rows_; ++row) {
    share = std::max(share, shares_[int64_t{page} * rows_ + row]);
  }
  job_.depths[page] = LadderDepth(sequence.decision, theta, share, job_.facts[page], head_dim_,
                                  sequence.stored_bits);
}

float Selection::Entropy() const {
  const HeadJob& head = *job_.head;
  double total = 0;
  for (int32_t row = 0; row < rows_; ++row) {
    const float lse = job_.row_lse[row];
    if (lse == kNegativeInfinity) continue;
    for (int32_t page = 0; page < job_.num_pages; ++page) {
      const float share = shares_[int64_t{page} * rows_ + row];
      if (share > 0) total += share * (lse - scan(page, row).log_mass);
    }
    for (int32_t i = 0; i < head.num_splits; ++i) {
      const PartialRows& split = head.splits[i].rows;
      if (split.max[row] == kNegativeInfinity) continue;
      // sum_t p (lse - s) with p = exp(s - lse).
      total += std::exp(split.max[row] - lse) * (split.sum[row] * lse - split.moment[row]);
    }
  }
  return static_cast<float>(total / rows_);
}

void Selection::Report() {
  HeadDecision* decision = job_.head->decision;
  std::vector<ErrorTerms> errors(rows_);
  for (int32_t page = 0; page < job_.num_pages; ++page) {
    const PageDepth& depth = job_.depths[page];
    ++decision->key_pages[KeyDepthIndex(depth.key.bits, depth.key.chunks)];
    ++decision->value_pages[depth.value_bits / 2];
    decision->value_bytes += static_cast<int64_t>(sizeof(ValueSummary)) + head_dim_;
    // Only a ladder reads keys deeper than it scanned them, and only those of opened pages.
    const float score_factor =
        job_.ladder && job_.facts[page].opened ? ScoreVarianceAt(1.0f, depth.key.bits) : 1.0f;
    for (int32_t row = 0; row < rows_; ++row) {
      const PageErrorParts& parts = parts_[int64_t{page} * rows_ + row];
      AddTerms(TermsOf(parts, score_factor, depth.value_bits), &errors[row]);
    }
  }
  float total = 0;
  for (int32_t row = 0; row < rows_; ++row) {
    total += RelativeErrorSquare(errors[row], norms_[row]);
  }
  decision->predicted_error = std::sqrt(total / static_cast<float>(rows_));
  decision->entropy = Entropy();
}

}  // namespace

PageRange VisibleSealedPages(const HeadJob& head) {
  const SequenceStep& sequence = *head.sequence;
  int64_t begin = std::numeric_limits<int64_t>::max(), end = 0;
  for (int32_t i = 0; i < sequence.q_len; ++i) {
    if (head.ranges[i].begin >= head.ranges[i].end) continue;
    begin = std::min(begin, head.ranges[i].begin);
    end = std::max(end, head.ranges[i].end);
  }
  const int64_t sealed = int64_t{sequence.num_sealed_pages} * kPageTokens;
  end = std::min(end, sealed);
  if (begin >= end) return PageRange{};
  return PageRange{static_cast<int32_t>(begin / kPageTokens),
                   static_cast<int32_t>((end - 1) / kPageTokens) + 1};
}

void LocalRanges(const HeadJob& head, int32_t group_size, int32_t page, KeyRange* out) {
  const int64_t first = int64_t{page} * kPageTokens;
  for (int32_t row = 0; row < head.rows; ++row) {
    const KeyRange& range = head.ranges[row / group_size];
    out[row].begin = std::clamp<int64_t>(range.begin - first, 0, kPageTokens);
    out[row].end = std::clamp<int64_t>(range.end - first, out[row].begin, kPageTokens);
  }
}

SealedPage JobPage(const SealedJob& job, int32_t head_dim, const std::byte* pool, int32_t page) {
  const PageId id = job.head->sequence->pages[job.first_page + page];
  return ViewSealedPage(job.layout, head_dim, job.head->kv_head, pool + PageOffset(id));
}

RotatedRows JobRows(const SealedJob& job, int32_t head_dim, int32_t page) {
  const HeadJob& head = *job.head;
  int32_t index = job.first_page + page;
  size_t run = 0;
  while (index >= head.sequence->bases[run].num_pages) {
    index -= head.sequence->bases[run++].num_pages;
  }
  RotatedRows rows;
  rows.q = head.rotated + static_cast<int64_t>(run) * head.rows * head_dim;
  rows.mean = head.mean_scores + static_cast<int64_t>(run) * head.rows;
  rows.rows = head.rows;
  rows.head_dim = head_dim;
  return rows;
}

PageMean JobPageMean(const SealedJob& job, const std::byte* pool, int32_t page) {
  const PageId id = job.head->sequence->pages[job.first_page + page];
  return ViewPageMean(job.layout, job.head->kv_head, pool + PageOffset(id));
}

void FinishMasses(SealedJob* job) {
  const HeadJob& head = *job->head;
  const int32_t rows = head.rows;
  for (int32_t row = 0; row < rows; ++row) {
    float max = kNegativeInfinity;
    for (int32_t i = 0; i < head.num_splits; ++i) max = std::max(max, head.splits[i].rows.max[row]);
    for (int32_t page = 0; page < job->num_pages; ++page) {
      max = std::max(max, job->scans[int64_t{page} * rows + row].log_mass);
    }
    job->row_max[row] = max;
    job->row_lse[row] = max;
    if (max == kNegativeInfinity) {
      for (int32_t page = 0; page < job->num_pages; ++page) {
        job->masses[int64_t{page} * rows + row] = 0;
      }
      continue;
    }
    float sum = 0;
    for (int32_t i = 0; i < head.num_splits; ++i) {
      const PartialRows& split = head.splits[i].rows;
      sum += split.sum[row] * std::exp(split.max[row] - max);
    }
    for (int32_t page = 0; page < job->num_pages; ++page) {
      const int64_t at = int64_t{page} * rows + row;
      job->masses[at] = std::exp(job->scans[at].log_mass - max);
      sum += job->masses[at];
    }
    job->row_lse[row] = max + std::log(sum);
  }
}

void OpenPages(SealedJob* job) {
  const DecisionParams& params = job->head->sequence->decision;
  const int32_t rows = job->head->rows;
  for (int32_t page = 0; page < job->num_pages; ++page) {
    PageFacts& facts = job->facts[page];
    facts.opened = facts.sink || facts.cut;
    for (int32_t row = 0; row < rows && !facts.opened; ++row) {
      const RowScan& scan = job->scans[int64_t{page} * rows + row];
      if (scan.lse == kNegativeInfinity) continue;
      facts.opened =
          OpensPage(scan.lse, scan.variance, params.coarse_z, job->row_lse[row], params.theta);
    }
  }
}

void SelectDepths(SealedJob* job, const AttentionShape& shape, const std::byte* pool) {
  Selection(job, shape.head_dim, shape.group_size(), pool).Run();
}

}  // namespace adaattn

// From masses to depths: shares, the policy, and what is reported of them.

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/sealed_job.h"
#include "kernels/cpu/select_rows.h"
#include "kernels/format/hadamard.h"
#include "kernels/format/seal.h"
#include "kernels/policy/budget.h"
#include "kernels/policy/error_model.h"
#include "kernels/policy/theta.h"

namespace adaattn {
namespace {

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// One head's selection in flight. Arrays named of rows are [rows, stride], of pages [stride].
class Selection {
 public:
  Selection(SealedJob* job, int32_t head_dim, int32_t group_size, const std::byte* pool,
            Arena* arena)
      : job_(*job),
        rows_(job->head->rows),
        stride_(job->stride),
        head_dim_(head_dim),
        group_(group_size),
        pool_(pool),
        arena_(arena) {}

  void Run() {
    Reserve();
    DecodeSink();
    ShareOutMass();
    Estimate();
    const float theta = job_.ladder ? ChooseTheta() : 0.0f;
    job_.head->decision->theta = theta;
    if (job_.ladder) {
      SelectByLadder(theta);
    } else {
      SelectFixed();
    }
    if (MeasureAttended() || !filled_) FillParts();
    Report();
    if (job_.estimate != nullptr) {
      std::copy_n(estimates_, int64_t{rows_} * head_dim_, job_.estimate);
    }
  }

 private:
  float* Pages() { return arena_->Get<float>(stride_); }
  PartsRow PartsOf(int32_t row) const {
    const int64_t at = int64_t{row} * stride_;
    return PartsRow{parts_.skipped + at, parts_.score + at, parts_.value + at};
  }

  void Reserve();
  void DecodeSink();
  void ShareOutMass();
  // o before attending, in the Hadamard frame: pages by what stands for them, dense tokens as they
  // are.
  void Estimate();
  void AddDense(int32_t row, float* o) const;
  void AddMeans(int32_t row, float* o) const;
  // What every page costs every row, with keys as the scan read them, and values no further from o
  // than has been measured.
  void FillParts();
  // Measure how far the values of pages that were not measured yet are from o; false: none.
  bool MeasureAbove(float share);
  bool MeasureAttended();
  void MeasureDistance(int32_t page);
  float ChooseTheta();
  float ChooseBudget();
  void SumBudgets(const PartsSum& sums, std::vector<PageBudget>* apart);
  void SelectByLadder(float theta);
  void SelectFixed();
  void CountPages(const PageDepth& depth, int32_t count);
  void SetFactors(int32_t page, const TermFactors& of);
  void Report();
  float Entropy() const;

  SealedJob& job_;
  const int32_t rows_;
  const int32_t stride_;
  const int32_t head_dim_;
  const int32_t group_;
  const std::byte* const pool_;
  Arena* const arena_;
  float* page_shares_ = nullptr;  // of pages: the largest of any row
  float* shares_ = nullptr;       // of rows
  float* distances_ = nullptr;    // of rows: |mean - o|^2; 0 until it is measured
  bool* measured_ = nullptr;      // [num_pages]
  int32_t* apart_ = nullptr;      // [num_apart_] pages whose depth depends on more than their share
  int32_t num_apart_ = 0;
  PartsRow parts_;              // of rows; 0 where the row sees none of the page
  bool filled_ = false;         // parts_ are
  PartsRow factors_;            // of pages: what their depth makes of their parts
  uint8_t* rung_of_ = nullptr;  // of pages
  PageDepth rung_depths_[kNumRungs];
  TermFactors rungs_[kNumRungs];
  MassSums* masses_ = nullptr;    // [rows] of the sealed pages
  float* estimates_ = nullptr;    // [rows, head_dim]
  float* norms_ = nullptr;        // [rows] |o|^2
  bool* first_stands_ = nullptr;  // [rows] the sink's first token stands for it, not its mean
  float* first_ = nullptr;        // [head_dim] the sink's first value, Hadamard frame
  float first_scale_rms_ = 0;
};

void Selection::Reserve() {
  arena_->Reset();
  page_shares_ = arena_->GetZeroed<float>(stride_);
  const int64_t cells = int64_t{rows_} * stride_;
  shares_ = arena_->Get<float>(cells);
  distances_ = arena_->GetZeroed<float>(cells);
  measured_ = arena_->GetZeroed<bool>(job_.num_pages);
  apart_ = arena_->Get<int32_t>(job_.num_pages);
  for (int32_t page = 0; page < job_.num_pages; ++page) {
    const PageFacts& facts = job_.facts[page];
    if (facts.sink || facts.cut || !facts.opened) apart_[num_apart_++] = page;
  }
  parts_ =
      PartsRow{arena_->Get<float>(cells), arena_->Get<float>(cells), arena_->Get<float>(cells)};
  first_stands_ = arena_->Get<bool>(rows_);
  factors_ = PartsRow{Pages(), Pages(), Pages()};
  rung_of_ = arena_->Get<uint8_t>(stride_);
  for (int32_t i = 0; i < kNumRungs; ++i) {
    const SequenceStep& sequence = *job_.head->sequence;
    rung_depths_[i] = RungDepth(sequence.decision, i, PageFacts(), head_dim_, sequence.stored_bits);
    rungs_[i] =
        FactorsOf(ScoreVarianceAt(1.0f, rung_depths_[i].key.bits), rung_depths_[i].value_bits);
  }
  masses_ = arena_->Get<MassSums>(rows_);
  estimates_ = arena_->GetZeroed<float>(int64_t{rows_} * head_dim_);
  norms_ = arena_->Get<float>(rows_);
  first_ = arena_->Get<float>(head_dim_);
}

void Selection::DecodeSink() {
  bool stands = false;
  for (int32_t row = 0; row < rows_; ++row) {
    first_stands_[row] =
        FirstTokenStandsForPage(job_.facts[0].sink, job_.head->ranges[row / group_].begin == 0,
                                job_.scans.concentration[int64_t{row} * stride_]);
    stands |= first_stands_[row];
  }
  if (!stands) return;
  const SequenceStep& sequence = *job_.head->sequence;
  const SealedHead head{head_dim_, job_.head->kv_head, job_.layout, kCpuTileOrder};
  const int32_t bits = job_.ladder ? sequence.stored_bits : job_.fixed.value_bits;
  first_scale_rms_ =
      DecodeFirstRotatedValue(head, pool_ + PageOffset(sequence.pages[0]), bits, first_);
}

void Selection::ShareOutMass() {
  for (int32_t row = 0; row < rows_; ++row) {
    const int64_t at = int64_t{row} * stride_;
    RowMass mass;
    mass.lse = job_.row_lse[row];
    const bool any = job_.row_max[row] > kNegativeInfinity;
    mass.scale = any ? std::exp(job_.row_max[row] - mass.lse) : 0.0f;
    masses_[row] =
        ShareOut(job_.scans.From(at), job_.masses + at, mass, stride_, shares_ + at, page_shares_);
  }
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

// What the scan summed up of the splits' means.
void Selection::AddMeans(int32_t row, float* o) const {
  if (job_.row_lse[row] == kNegativeInfinity) return;
  const int32_t padded = WholeVectors(job_.num_splits);
  float* weights = arena_->Get<float>(padded);
  const float** vectors = arena_->Get<const float*>(job_.num_splits);
  std::fill_n(weights, padded, kNegativeInfinity);
  for (int32_t split = 0; split < job_.num_splits; ++split) {
    weights[split] = job_.splits[split].max[row];
    vectors[split] = job_.splits[split].acc + int64_t{row} * head_dim_;
  }
  ExpBelow(weights, job_.row_lse[row], padded, weights);
  AddWeighted(vectors, weights, job_.num_splits, head_dim_, o);
}

void Selection::Estimate() {
  bool replaced = false;
  std::vector<float> sink(static_cast<size_t>(rows_), 0.0f);  // what to take back of its mean
  for (int32_t row = 0; row < rows_; ++row) {
    float* o = estimates_ + int64_t{row} * head_dim_;
    AddDense(row, o);
    AddMeans(row, o);
    if (!first_stands_[row]) continue;
    replaced = true;
    sink[row] = -shares_[int64_t{row} * stride_];
    AddScaled(first_, -sink[row], head_dim_, o);
  }
  if (replaced) AddValueMeans(job_.means, 1, head_dim_, sink.data(), 1, rows_, estimates_);
  for (int32_t row = 0; row < rows_; ++row) {
    norms_[row] = SquareDistance(estimates_ + int64_t{row} * head_dim_, nullptr, head_dim_);
  }
}

void Selection::FillParts() {
  filled_ = true;
  for (int32_t row = 0; row < rows_; ++row) {
    const int64_t at = int64_t{row} * stride_;
    const float spread = job_.spreads[0], scale_rms = job_.scale_rms[0];
    if (first_stands_[row]) {
      job_.spreads[0] = 0;
      job_.scale_rms[0] = first_scale_rms_;
    }
    FillPartsRow(job_.scans.From(at), shares_ + at, distances_ + at, job_.spreads, job_.scale_rms,
                 head_dim_, stride_, PartsOf(row));
    job_.spreads[0] = spread;
    job_.scale_rms[0] = scale_rms;
  }
}

void Selection::MeasureDistance(int32_t page) {
  measured_[page] = true;
  ValueMeanDistances(job_.means[page], head_dim_, estimates_, norms_, rows_, stride_,
                     distances_ + page);
  for (int32_t row = 0; page == 0 && row < rows_; ++row) {
    if (!first_stands_[row]) continue;
    distances_[int64_t{row} * stride_] =
        SquareDistance(first_, estimates_ + int64_t{row} * head_dim_, head_dim_);
  }
}

bool Selection::MeasureAbove(float share) {
  bool any = false;
  for (int32_t page = 0; page < job_.num_pages; ++page) {
    if (!(page_shares_[page] > share) || measured_[page]) continue;
    MeasureDistance(page);
    any = true;
  }
  return any;
}

bool Selection::MeasureAttended() {
  bool any = false;
  for (int32_t page = 0; page < job_.num_pages; ++page) {
    if (job_.depths[page].value_bits == 0 || measured_[page]) continue;
    MeasureDistance(page);
    any = true;
  }
  return any;
}

float Selection::ChooseTheta() {
  const SequenceStep& sequence = *job_.head->sequence;
  const DecisionParams& params = sequence.decision;
  if (params.policy == Policy::kBudget) return ChooseBudget();
  if (params.policy == Policy::kThreshold) return GivenTheta(sequence, job_.head->kv_head);
  MassSums sums;
  for (int32_t row = 0; row < rows_; ++row) {
    if (job_.row_lse[row] == kNegativeInfinity) continue;
    MassSums own = masses_[row];
    AddDenseMass(1.0f - own.sealed, &own);
    AddMasses(own, &sums);
  }
  return ThetaFromMasses(params, sums, rows_, job_.num_pages);
}

// As policy/budget.h's ChooseTheta, all pages at once for one theta after the other, the largest
// first. What skipping loses only grows with theta, which says where to begin. Without distances
// errors are too small: what does not fit without them does not fit, and they are measured for the
// pages that a theta which may fit would attend.
float Selection::ChooseBudget() {
  const SequenceStep& sequence = *job_.head->sequence;
  const DecisionParams& params = sequence.decision;
  const float target = params.target_relative_error;
  const PartsSum sums{{Pages(), Pages(), Pages()}, Pages()};
  std::vector<PageBudget> apart;
  for (int32_t i = 0; i < num_apart_; ++i) MeasureDistance(apart_[i]);
  SumBudgets(sums, &apart);
  int32_t begin = kNumBudgetThetas - 1;
  for (int32_t below = 0; params.floor_value_bits == 0 && below < begin;) {
    const int32_t middle = (below + begin + 1) / 2;
    const ErrorTerms lost = SumSkipped(sums, page_shares_, BudgetTheta(middle), stride_);
    if (FitsBudget(lost, target)) {
      below = middle;
    } else {
      begin = middle - 1;
    }
  }
  const auto sum_of = [&](float theta) {
    ErrorTerms terms = SumLadder(sums, page_shares_, theta, rungs_, stride_);
    for (const PageBudget& page : apart) {
      AddTerms(BudgetTermsAt(params, page, theta, head_dim_, sequence.stored_bits), &terms);
    }
    return terms;
  };
  return LargestTheta(begin, target, [&](float theta) {
    const ErrorTerms terms = sum_of(theta);
    if (!FitsBudget(terms, target)) return terms;
    // A step of the grid further than asked: theta rarely ends where it first may fit.
    const bool more = MeasureAbove(params.floor_value_bits > 0 ? -1.0f : 0.7f * theta);
    if (!more) return terms;
    SumBudgets(sums, &apart);
    return sum_of(theta);
  });
}

// The parts of all rows together; those of pages whose depth depends on more than their share are
// set apart.
void Selection::SumBudgets(const PartsSum& sums, std::vector<PageBudget>* apart) {
  FillParts();
  const PartsRow& parts = sums.parts;
  for (float* part : {parts.skipped, parts.score, parts.value}) std::fill_n(part, stride_, 0.0f);
  for (int32_t row = 0; row < rows_; ++row) {
    if (!(norms_[row] > 0)) continue;
    AddParts(PartsOf(row), 1.0f / (norms_[row] * static_cast<float>(rows_)), stride_, sums);
  }
  apart->clear();
  for (int32_t i = 0; i < num_apart_; ++i) {
    const int32_t page = apart_[i];
    apart->push_back(PageBudget{page_shares_[page],
                                job_.facts[page],
                                {parts.skipped[page], parts.score[page], parts.value[page]}});
    parts.skipped[page] = parts.score[page] = parts.value[page] = 0;
  }
  TakeRoots(stride_, sums);
}

void Selection::CountPages(const PageDepth& depth, int32_t count) {
  HeadDecision* decision = job_.head->decision;
  decision->key_pages[KeyDepthIndex(depth.key.bits, depth.key.chunks)] += count;
  decision->value_pages[depth.value_bits / 2] += count;
}

void Selection::SetFactors(int32_t page, const TermFactors& of) {
  factors_.skipped[page] = of.skipped;
  factors_.score[page] = of.score;
  factors_.value[page] = of.value;
}

void Selection::SelectByLadder(float theta) {
  const SequenceStep& sequence = *job_.head->sequence;
  int32_t above[kNumRungs] = {};
  FindRungs(page_shares_, theta, rungs_, stride_, rung_of_, factors_, above);
  CountPages(rung_depths_[0], job_.num_pages - above[0]);
  for (int32_t i = 1; i < kNumRungs; ++i) CountPages(rung_depths_[i], above[i - 1] - above[i]);
  for (int32_t page = 0; page < job_.num_pages; ++page) {
    job_.depths[page] = rung_depths_[rung_of_[page]];
  }
  for (int32_t i = 0; i < num_apart_; ++i) {
    const int32_t page = apart_[i];
    const PageFacts& facts = job_.facts[page];
    PageDepth& depth = job_.depths[page];
    CountPages(depth, -1);
    depth = LadderDepth(sequence.decision, theta, page_shares_[page], facts, head_dim_,
                        sequence.stored_bits);
    CountPages(depth, 1);
    // Keys of pages that were not opened are not read deeper than they were scanned.
    SetFactors(page, FactorsOf(facts.opened ? ScoreVarianceAt(1.0f, depth.key.bits) : 1.0f,
                               depth.value_bits));
  }
}

void Selection::SelectFixed() {
  std::fill_n(job_.depths, job_.num_pages, job_.fixed);
  CountPages(job_.fixed, job_.num_pages);
  // The scan read keys as deep as they are to be read.
  for (int32_t page = 0; page < stride_; ++page) {
    SetFactors(page, FactorsOf(1.0f, job_.fixed.value_bits));
  }
}

float Selection::Entropy() const {
  const HeadJob& head = *job_.head;
  double total = 0;
  for (int32_t row = 0; row < rows_; ++row) {
    const float lse = job_.row_lse[row];
    if (lse == kNegativeInfinity) continue;
    total += masses_[row].entropy;
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
  decision->value_bytes +=
      job_.num_pages * (static_cast<int64_t>(sizeof(ValueSummary)) + head_dim_);
  float total = 0;
  for (int32_t row = 0; row < rows_; ++row) {
    total += RelativeErrorSquare(SumTerms(PartsOf(row), factors_, stride_), norms_[row]);
  }
  decision->predicted_error = std::sqrt(total / static_cast<float>(rows_));
  decision->entropy = Entropy();
}

}  // namespace

void SelectDepths(SealedJob* job, const AttentionShape& shape, const std::byte* pool,
                  Arena* arena) {
  Selection(job, shape.head_dim, shape.group_size(), pool, arena).Run();
}

}  // namespace adaattn

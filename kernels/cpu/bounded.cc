#include "kernels/cpu/bounded.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/cpu/bounded_arithmetic.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/merge.h"
#include "kernels/format/float_types.h"

namespace adaattn {
namespace {

// The expectation knows no exact masses and guesses o: it aims a little lower.
constexpr double kPlanMargin = 0.9;

double Norm(const double* x, int32_t count) {
  return std::sqrt(std::inner_product(x, x + count, x, 0.0));
}

}  // namespace

BoundedHead::BoundedHead(const CpuContext& context, const AttendBatch& batch, HeadJob* head,
                         SealedJob* job)
    : context_(context),
      batch_(batch),
      head_(head),
      job_(job),
      head_dim_(batch.shape.head_dim),
      group_(batch.shape.group_size()),
      dense_splits_(head->num_splits),
      query_norms_(head->rows) {
  dense_ = ExtentOf(head->sequence->pages, head->dense_begin, head->dense_end);
  for (int32_t row = 0; row < rows(); ++row) {
    const float* q = head->q + int64_t{row} * head_dim_;
    query_norms_[row] = std::sqrt(std::inner_product(q, q + head_dim_, q, 0.0));
  }
  if (job_ != nullptr) score_errors_.resize(int64_t{job_->stride} * rows());
}

DenseExtent BoundedHead::ExtentOf(absl::Span<const PageId> pages, int64_t begin,
                                  int64_t end) const {
  const DType type = DenseDType(batch_.format);
  const SequenceStep& sequence = *head_->sequence;
  const bool scaled = type == DType::kF8E4m3;
  const double key_scale =
      scaled && !sequence.key_scales.empty() ? sequence.key_scales[head_->kv_head] : 1.0;
  const double value_scale =
      scaled && !sequence.value_scales.empty() ? sequence.value_scales[head_->kv_head] : 1.0;
  const int64_t token_bytes = int64_t{head_dim_} * DTypeBytes(type);
  DenseExtent extent;
  float row[256];
  const auto largest = [&](const std::byte* at, double scale, double* norm) {
    if (scaled) {
      for (int32_t c = 0; c < head_dim_; ++c) row[c] = ReadElement(at, type, c);
    } else {
      (void)ToFloats(type, at, head_dim_, row);
    }
    *norm = std::max(*norm, scale * std::sqrt(std::inner_product(row, row + head_dim_, row, 0.0)));
  };
  for (int64_t position = begin; position < end; ++position) {
    const std::byte* page = context_.pool + PageOffset(pages[position / kPageTokens]);
    const int64_t offset = position % kPageTokens * token_bytes;
    largest(page + DenseKeyOffset(head_->kv_head, head_dim_, type) + offset, key_scale,
            &extent.key);
    largest(page + DenseValueOffset(batch_.shape, head_->kv_head, type) + offset, value_scale,
            &extent.value);
  }
  return extent;
}

// score_errors_ of one page, as deep as its keys have been read.
void BoundedHead::BoundScores(int32_t page) {
  const RotatedRows rotated = JobRows(*job_, head_dim_, page);
  const SealedPage view = JobPage(*job_, context_.pool, page);
  for (int32_t row = 0; row < rows(); ++row) {
    const KeyRanges ranges =
        SumKeyRanges(rotated.q + int64_t{row} * head_dim_, view.key_scales(), head_dim_);
    score_errors_[Cell(page, row)] = SealedScoreError(
        ranges, query_norms_[row], rotated.mean[row], head_dim_, job_->raw_bits[page], kHalfStep,
        head_->sequence->softmax_scale, head_->sequence->softcap);
  }
}

void BoundedHead::RefinePage(int32_t page, SealedWorker* worker) {
  const int32_t bits = head_->sequence->stored_bits;
  const RotatedRows rotated = JobRows(*job_, head_dim_, page);
  const SealedPage view = JobPage(*job_, context_.pool, page);
  const ScoreParams params{head_->sequence->softmax_scale, head_->sequence->softcap};
  float* raw = job_->raw + int64_t{page} * rows() * kPageTokens;
  RefineKeys(view, rotated, bits, job_->layout.num_chunks, &worker->scratch, raw);
  head_->decision->key_bytes += int64_t{head_dim_} * kPageTokens * (bits - kScanBits) / 8;
  job_->raw_bits[page] = static_cast<uint8_t>(bits);
  worker->visible.resize(static_cast<size_t>(rows()));
  worker->floats.resize(static_cast<size_t>(rows()) * 3);
  LocalRanges(*head_, group_, job_->first_page + page, worker->visible.data());
  float* max = worker->floats.data();
  const PageSums sums{max, max + rows(), max + 2 * rows(), 1};
  PageStatistics(rotated, params, worker->visible.data(), raw, sums);
  for (int32_t row = 0; row < rows(); ++row) {
    job_->scans.lse[Cell(page, row)] = sums.max[row] + std::log(sums.sum[row]);
  }
  BoundScores(page);
}

// Reads the keys of all pages as deep as their depths say: at the scan's bits or at all of them.
void BoundedHead::RefinePages(SealedWorker* worker) {
  for (int32_t page = 0; page < job_->num_pages; ++page) {
    PageDepth& depth = job_->depths[page];
    if (depth.key.bits > kScanBits) {
      depth.key.bits = static_cast<uint8_t>(head_->sequence->stored_bits);
      if (job_->raw_bits[page] < depth.key.bits && !exact(page)) RefinePage(page, worker);
    }
    if (depth.value_bits == 0) continue;
    // Attended pages count by their scores; skipped ones by the mass that stands for them.
    for (int32_t row = 0; row < rows(); ++row) {
      job_->scans.log_mass[Cell(page, row)] = job_->scans.lse[Cell(page, row)];
    }
  }
  FinishMasses(job_);
}

void BoundedHead::Plan(SealedWorker* worker) {
  if (job_ == nullptr) return;
  if (depth_ == BoundDepth::kPolicy) {
    for (int32_t page = 0; page < job_->num_pages; ++page) BoundScores(page);
  }
  RefinePages(worker);
  const double target = kPlanMargin * head_->sequence->decision.target_relative_error;
  while (Expected() > target && Deepen(worker)) {
  }
}

// To the next level; false: nothing is left to read. From the ladder straight to exact pages where
// that costs no more than every stored bit of all pages.
bool BoundedHead::Deepen(SealedWorker* worker) {
  const int32_t stored_bits = head_->sequence->stored_bits;
  const auto marked =
      static_cast<int32_t>(std::count(job_->exact, job_->exact + job_->num_pages, uint8_t{1}));
  if (depth_ == BoundDepth::kExactPages) {
    MarkExact(job_->num_pages);
    return marked < job_->num_pages;
  }
  if (keeps_exact_pages()) {
    const int32_t count = ExactPagesNeeded();
    const bool stored_read = depth_ == BoundDepth::kStoredBits;
    if (stored_read || int64_t{count} * 16 <= int64_t{job_->num_pages} * (stored_bits - 2)) {
      depth_ = BoundDepth::kExactPages;
      MarkExact(count);
      return true;
    }
  }
  if (depth_ == BoundDepth::kStoredBits) return false;
  depth_ = BoundDepth::kStoredBits;
  for (int32_t page = 0; page < job_->num_pages; ++page) {
    job_->depths[page] = FullDepth(head_dim_, stored_bits);
  }
  RefinePages(worker);
  return true;
}

// Pages by how much they may add to the error, most first.
std::vector<int32_t> BoundedHead::PagesByWeight() const {
  std::vector<double> weights(job_->num_pages, 0.0);
  for (int32_t row = 0; row < rows(); ++row) {
    if (job_->row_lse[row] == -std::numeric_limits<float>::infinity()) continue;
    std::vector<double> o(job_->estimate + int64_t{row} * head_dim_,
                          job_->estimate + int64_t{row + 1} * head_dim_);
    const double norm = std::max(Norm(o.data(), head_dim_), 1e-30);
    std::vector<BoundTerm> terms;
    double rounding = 0;
    AddSealedTerms(row, o.data(), norm, job_->row_lse[row], &terms, &rounding);
    for (int32_t page = 0, next = 0; page < job_->num_pages; ++page) {
      if (exact(page)) continue;
      const BoundTerm& term = terms[next++];
      const double worst = std::expm1(std::min(term.score_error, 300.0)) * term.distance;
      weights[page] = std::max(weights[page], term.mass * (worst + term.value_error) / norm);
    }
  }
  std::vector<int32_t> order(job_->num_pages);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&weights](int32_t a, int32_t b) { return weights[a] > weights[b]; });
  return order;
}

// The fewest pages, heaviest first, whose originals are expected to make the bound hold.
int32_t BoundedHead::ExactPagesNeeded() {
  const double target = kPlanMargin * head_->sequence->decision.target_relative_error;
  const std::vector<int32_t> order = PagesByWeight();
  int32_t low = 1, high = job_->num_pages;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    std::fill_n(job_->exact, job_->num_pages, uint8_t{0});
    for (int32_t i = 0; i < middle; ++i) job_->exact[order[i]] = 1;
    if (Expected() <= target) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  std::fill_n(job_->exact, job_->num_pages, uint8_t{0});
  return low;
}

void BoundedHead::MarkExact(int32_t count) {
  const std::vector<int32_t> order = PagesByWeight();
  for (int32_t i = 0; i < count; ++i) job_->exact[order[i]] = 1;
}

void BoundedHead::AttendRun(int32_t first, int32_t end, DenseScratch* scratch) {
  const SequenceStep& sequence = *head_->sequence;
  DenseWork work = MakeDenseWork(context_, batch_, *head_);
  work.pages = sequence.exact_pages.data();
  work.begin = int64_t{job_->first_page + first} * kPageTokens;
  work.end = int64_t{job_->first_page + end} * kPageTokens;
  std::vector<float> memory(static_cast<size_t>(rows()) * (head_dim_ + 2));
  PartialRows part;
  part.max = memory.data();
  part.sum = part.max + rows();
  part.acc = part.sum + rows();
  WeightedPartial& target = head_->splits[dense_splits_ + 1];
  target.key_bytes += AttendDense(work, scratch, part);
  for (int32_t row = 0; row < rows(); ++row) MergeRow(part, row, head_dim_, &target.rows);
  const DenseExtent extent = ExtentOf(sequence.exact_pages, work.begin, work.end);
  exact_.key = std::max(exact_.key, extent.key);
  exact_.value = std::max(exact_.value, extent.value);
}

void BoundedHead::AttendExactPages(DenseScratch* scratch) {
  if (job_ == nullptr || depth_ != BoundDepth::kExactPages) return;
  WeightedPartial& target = head_->splits[dense_splits_ + 1];
  head_->decision->key_bytes += target.key_bytes;  // of an earlier reading
  head_->decision->value_bytes += target.key_bytes;
  target.key_bytes = 0;
  std::fill_n(target.rows.max, rows(), -std::numeric_limits<float>::infinity());
  std::fill_n(target.rows.sum, rows(), 0.0f);
  std::fill_n(target.rows.moment, rows(), 0.0f);
  std::fill_n(target.rows.acc, int64_t{rows()} * head_dim_, 0.0f);
  const auto most = static_cast<int32_t>(SplitPages(job_->num_pages));
  for (int32_t page = 0; page < job_->num_pages;) {
    int32_t end = page;
    while (end < job_->num_pages && end - page < most && exact(end)) ++end;
    if (end > page) AttendRun(page, end, scratch);
    page = std::max(end, page + 1);
  }
  head_->num_splits = dense_splits_ + 2;
}

}  // namespace adaattn

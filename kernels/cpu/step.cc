#include "kernels/cpu/step.h"

#include <algorithm>
#include <atomic>

#include "absl/time/clock.h"
#include "kernels/cpu/append.h"
#include "kernels/cpu/bounded.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/merge.h"
#include "kernels/cpu/sealed_job.h"
#include "kernels/cpu/sealed_step.h"
#include "kernels/format/basis.h"

namespace adaattn {
namespace {

constexpr int64_t kMinSplitPages = 16;
constexpr int64_t kMaxSplits = 64;

// Below this many multiplications (about 20 us on one core) waking the other threads costs more
// than they save.
constexpr int64_t kAloneMultiplies = 400000;

struct DenseSplit {
  const HeadJob* job = nullptr;
  int32_t split = 0;
  int64_t begin = 0;
  int64_t end = 0;
};

// Facts that worker threads find; relaxed, since the loop's end orders them.
struct SequenceFlags {
  std::atomic<bool> nonfinite_q{false};
  std::atomic<bool> nonfinite_kv{false};
};

class Step {
 public:
  Step(const CpuContext& context, const AttendBatch& batch)
      : context_(context), batch_(batch), flags_(batch.sequences.size()) {}

  void Run() {
    Layout();
    const absl::Time start = absl::Now();
    Append();
    const absl::Time appended = absl::Now();
    AttendDensePages();
    StageTimes* times = batch_.buffers->stage_times();
    *times = StageTimes();
    times->append = appended - start;
    times->attend = absl::Now() - appended;
    AttendSealed(context_, batch_, absl::MakeSpan(jobs_), times);
    const absl::Time attended = absl::Now();
    Merge();
    times->merge = absl::Now() - attended;
  }

 private:
  void Layout();
  void LayoutHead(int32_t sequence_idx, int32_t kv_head, int64_t first_q_row,
                  const KeyRange* ranges);
  void LayoutDense(HeadJob* job);
  PartialRows NewPartial(int32_t rows);
  void Append();
  void PrepareQueries(const HeadJob& job);
  void RotateToBases(const HeadJob& job);
  void AttendDensePages();
  void RunDenseSplit(const DenseSplit& split, int32_t worker);
  void Merge();
  void For(int64_t num_items, absl::FunctionRef<void(int64_t, int32_t)> run) {
    context_.workers->ParallelFor(num_items, multiplies_ < kAloneMultiplies, run);
  }

  const CpuContext context_;
  const AttendBatch& batch_;
  std::vector<SequenceFlags> flags_;
  std::vector<HeadJob> jobs_;
  std::vector<AppendWork> appends_;
  std::vector<DenseSplit> dense_splits_;
  int64_t multiplies_ = 0;
};

void Step::Layout() {
  const int32_t num_kv_heads = batch_.shape.num_kv_heads;
  jobs_.reserve(batch_.sequences.size() * static_cast<size_t>(num_kv_heads));
  int64_t q_row = 0, kv_row = 0;
  for (int32_t i = 0; i < static_cast<int32_t>(batch_.sequences.size()); ++i) {
    const SequenceStep& sequence = batch_.sequences[i];
    for (int32_t row = 0; row < sequence.append_len;) {
      const int32_t room =
          kPageTokens - static_cast<int32_t>((sequence.kv_len + row) % kPageTokens);
      const int32_t end = std::min(sequence.append_len, row + room);
      appends_.push_back({&sequence, i, kv_row, row, end});
      row = end;
    }
    KeyRange* ranges = context_.arena->Get<KeyRange>(sequence.q_len);
    for (int32_t row = 0; row < sequence.q_len; ++row) ranges[row] = VisibleKeys(sequence, row);
    for (int32_t head = 0; head < num_kv_heads; ++head) LayoutHead(i, head, q_row, ranges);
    q_row += sequence.q_len;
    kv_row += sequence.append_len;
  }
  multiplies_ += 8 * kv_row * num_kv_heads * batch_.shape.head_dim;
}

void Step::LayoutHead(int32_t sequence_idx, int32_t kv_head, int64_t first_q_row,
                      const KeyRange* ranges) {
  const SequenceStep& sequence = batch_.sequences[sequence_idx];
  HeadDecision* decision =
      batch_.buffers->decisions() + int64_t{sequence_idx} * batch_.shape.num_kv_heads + kv_head;
  *decision = HeadDecision();
  if (sequence.q_len == 0) return;
  HeadJob job;
  job.sequence = &sequence;
  job.sequence_idx = sequence_idx;
  job.kv_head = kv_head;
  job.rows = sequence.q_len * batch_.shape.group_size();
  job.first_q_row = first_q_row;
  job.q = context_.arena->Get<float>(int64_t{job.rows} * batch_.shape.head_dim);
  job.ranges = ranges;
  job.decision = decision;
  const int64_t runs = static_cast<int64_t>(sequence.bases.size());
  job.rotated = context_.arena->Get<float>(runs * job.rows * batch_.shape.head_dim);
  job.mean_scores = context_.arena->Get<float>(runs * job.rows);
  multiplies_ += runs * job.rows * batch_.shape.head_dim * batch_.shape.head_dim;
  jobs_.push_back(job);
  LayoutDense(&jobs_.back());
}

void Step::LayoutDense(HeadJob* job) {
  const SequenceStep& sequence = *job->sequence;
  int64_t begin = sequence.kv_len + sequence.append_len, end = 0;
  for (int32_t row = 0; row < sequence.q_len; ++row) {
    const KeyRange& range = job->ranges[row];
    if (range.begin >= range.end) continue;
    begin = std::min(begin, range.begin);
    end = std::max(end, range.end);
  }
  begin = std::max(begin, int64_t{sequence.num_sealed_pages} * kPageTokens);
  if (begin >= end) begin = end;
  job->dense_begin = begin;
  job->dense_end = end;
  const int64_t first_page = begin / kPageTokens;
  const int64_t num_pages = begin < end ? (end - 1) / kPageTokens - first_page + 1 : 0;
  const int64_t split_pages = SplitPages(num_pages);
  job->num_splits = static_cast<int32_t>((num_pages + split_pages - 1) / split_pages);
  const int32_t beside_dense = sequence.decision.bounded ? 2 : 1;
  job->splits = context_.arena->Get<WeightedPartial>(job->num_splits + beside_dense);
  for (int32_t i = 0; i < beside_dense; ++i) {
    job->splits[job->num_splits + i] = {NewPartial(job->rows), 1.0f, 0};
  }
  const DType type = DenseDType(batch_.format);
  const float value_scale = type == DType::kF8E4m3 && !sequence.value_scales.empty()
                                ? sequence.value_scales[job->kv_head]
                                : 1.0f;
  for (int32_t split = 0; split < job->num_splits; ++split) {
    job->splits[split] = {NewPartial(job->rows), value_scale * DenseValueFactor(type), 0};
    const int64_t page = first_page + split * split_pages;
    dense_splits_.push_back({job, split, std::max(begin, page * kPageTokens),
                             std::min(end, (page + split_pages) * kPageTokens)});
  }
  multiplies_ += 2 * (end - begin) * job->rows * batch_.shape.head_dim;
}

PartialRows Step::NewPartial(int32_t rows) {
  PartialRows partial;
  partial.max = context_.arena->Get<float>(rows);
  partial.sum = context_.arena->Get<float>(rows);
  partial.moment = context_.arena->Get<float>(rows);
  partial.acc = context_.arena->Get<float>(int64_t{rows} * batch_.shape.head_dim);
  return partial;
}

void Step::PrepareQueries(const HeadJob& job) {
  const AttentionShape& shape = batch_.shape;
  const int32_t group = shape.group_size();
  const int64_t row_bytes = int64_t{shape.head_dim} * DTypeBytes(batch_.in_type);
  bool finite = true;
  for (int32_t i = 0; i < job.sequence->q_len; ++i) {
    const int64_t first = (job.first_q_row + i) * shape.num_q_heads + int64_t{job.kv_head} * group;
    finite &=
        ToFloats(batch_.in_type, batch_.buffers->q() + first * row_bytes,
                 int64_t{group} * shape.head_dim, job.q + int64_t{i} * group * shape.head_dim);
  }
  RotateToBases(job);
  if (!finite) flags_[job.sequence_idx].nonfinite_q.store(true, std::memory_order_relaxed);
}

// Runs without a page that some row sees are left alone.
void Step::RotateToBases(const HeadJob& job) {
  const int32_t head_dim = batch_.shape.head_dim;
  const PageRange visible = VisibleSealedPages(job);
  int32_t first_page = 0;
  for (size_t run = 0; run < job.sequence->bases.size(); ++run) {
    const BasisRun& pages = job.sequence->bases[run];
    const bool seen = first_page < visible.end && first_page + pages.num_pages > visible.first;
    first_page += pages.num_pages;
    if (!seen) continue;
    const BasisView basis =
        ViewBasis(context_.pool + PageOffset(pages.basis), batch_.shape, job.kv_head);
    const int64_t row = static_cast<int64_t>(run) * job.rows;
    RotateQueries(&basis.query_basis->bits, basis.mean, job.q, job.rows, head_dim,
                  job.rotated + row * head_dim, job.mean_scores + row);
    job.decision->basis_bytes += BasisReadBytes(head_dim);
  }
}

void Step::Append() {
  const int64_t num_appends = static_cast<int64_t>(appends_.size());
  For(num_appends + static_cast<int64_t>(jobs_.size()), [&](int64_t item, int32_t) {
    if (item >= num_appends) return PrepareQueries(jobs_[item - num_appends]);
    const AppendWork& work = appends_[item];
    if (!AppendRows(batch_, work, context_.pool)) {
      flags_[work.sequence_idx].nonfinite_kv.store(true, std::memory_order_relaxed);
    }
  });
  for (size_t i = 0; i < flags_.size(); ++i) {
    SequenceResult& result = batch_.buffers->results()[i];
    result.nonfinite_q = flags_[i].nonfinite_q.load(std::memory_order_relaxed);
    result.nonfinite_kv = flags_[i].nonfinite_kv.load(std::memory_order_relaxed);
  }
}

void Step::RunDenseSplit(const DenseSplit& split, int32_t worker) {
  DenseWork work = MakeDenseWork(context_, batch_, *split.job);
  work.begin = split.begin;
  work.end = split.end;
  WeightedPartial& target = split.job->splits[split.split];
  target.key_bytes = AttendDense(work, &(*context_.scratch)[worker], target.rows);
}

void Step::AttendDensePages() {
  For(static_cast<int64_t>(dense_splits_.size()),
      [&](int64_t item, int32_t worker) { RunDenseSplit(dense_splits_[item], worker); });
}

void Step::Merge() {
  For(static_cast<int64_t>(jobs_.size()), [&](int64_t item, int32_t) {
    HeadJob& job = jobs_[item];
    const bool sealed = VisibleSealedPages(job).end > 0;
    if (!sealed && job.sequence->decision.bounded) {
      BoundedHead(context_, batch_, &job, nullptr).Settle(nullptr);
    }
    const int64_t tokens = job.dense_end - job.dense_begin;
    job.decision->dense_tokens = static_cast<int32_t>(tokens);
    for (int32_t i = 0; i < job.num_splits; ++i) {
      job.decision->key_bytes += job.splits[i].key_bytes;
      job.decision->value_bytes += job.splits[i].key_bytes;
    }
    const float entropy = MergeHead(batch_, job);
    // With sealed pages the selection has it, from the page shares.
    if (!sealed) job.decision->entropy = entropy;
  });
}

}  // namespace

DenseWork MakeDenseWork(const CpuContext& context, const AttendBatch& batch, const HeadJob& job) {
  const SequenceStep& sequence = *job.sequence;
  DenseWork work;
  work.pool = context.pool;
  work.pages = sequence.pages.data();
  work.type = DenseDType(batch.format);
  work.head_dim = batch.shape.head_dim;
  work.key_offset = DenseKeyOffset(job.kv_head, work.head_dim, work.type);
  work.value_offset = DenseValueOffset(batch.shape, job.kv_head, work.type);
  work.rows = job.rows;
  work.rows_per_range = batch.shape.group_size();
  work.ranges = job.ranges;
  work.q = job.q;
  work.score_scale = sequence.softmax_scale;
  if (work.type == DType::kF8E4m3 && !sequence.key_scales.empty()) {
    work.score_scale *= sequence.key_scales[job.kv_head];
  }
  work.softcap = sequence.softcap;
  return work;
}

KeyRange VisibleKeys(const SequenceStep& sequence, int32_t row) {
  const int64_t position = sequence.q_start + row;
  KeyRange range;
  range.end = std::min(position + 1, sequence.kv_len + sequence.append_len);
  range.begin = sequence.window > 0 ? std::max<int64_t>(position - sequence.window + 1, 0) : 0;
  if (range.begin > range.end) range.begin = range.end;
  return range;
}

int64_t SplitPages(int64_t num_pages) {
  const int64_t pages = std::max(kMinSplitPages, (num_pages + kMaxSplits - 1) / kMaxSplits);
  return (pages + kPagesInVector - 1) / kPagesInVector * kPagesInVector;
}

void RunStep(const CpuContext& context, const AttendBatch& batch) {
  context.arena->Reset();
  Step(context, batch).Run();
}

}  // namespace adaattn

#include "kernels/cpu/sealed_step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "kernels/cpu/bounded.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/sealed_job.h"
#include "kernels/format/hadamard.h"
#include "kernels/policy/error_model.h"

namespace adaattn {
namespace {

// Scores kept from scan to attend, of all heads that go through the stages together. More would
// fall out of the caches between the stages.
constexpr int64_t kWaveScoreBytes = int64_t{16} << 20;

constexpr int32_t kMeansAtOnce = 16;
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// Whether a second stage scans what the first leaves.
bool TwoStage(const SealedJob& job) {
  return job.ladder && job.first_chunks < job.layout.num_chunks;
}

RowScans NewScans(int64_t cells, Arena* arena) {
  RowScans scans;
  for (float** part : {&scans.lse, &scans.concentration, &scans.variance, &scans.log_mass}) {
    *part = arena->Get<float>(cells);
  }
  for (float** part : {&scans.read, &scans.total}) *part = arena->GetZeroed<float>(cells);
  for (float** part : {&scans.max, &scans.sum, &scans.squares}) {
    *part = arena->Get<float>(cells);
    std::fill_n(*part, cells, part == &scans.max ? kNegativeInfinity : 1.0f);
  }
  return scans;
}

// Pages of the job of which every row sees every token.
PageRange WholePages(const HeadJob& head, PageRange pages) {
  int64_t begin = 0, end = std::numeric_limits<int64_t>::max();
  for (int32_t i = 0; i < head.sequence->q_len; ++i) {
    begin = std::max(begin, head.ranges[i].begin);
    end = std::min(end, head.ranges[i].end);
  }
  const auto first = static_cast<int32_t>((begin + kPageTokens - 1) / kPageTokens);
  const auto last = static_cast<int32_t>(std::min<int64_t>(end / kPageTokens, pages.end));
  return PageRange{first - pages.first, last - pages.first};
}

struct SplitItem {
  SealedJob* job = nullptr;
  int32_t split = 0;
};

// Some heads of the batch, stage by stage.
class Wave {
 public:
  Wave(const CpuContext& context, const AttendBatch& batch)
      : context_(context),
        head_dim_(batch.shape.head_dim),
        group_(batch.shape.group_size()),
        shape_(batch.shape),
        batch_(batch) {}

  void Add(HeadJob* head, PageRange pages);
  void Run(StageTimes* times);

 private:
  template <class Stage>
  void ForSplits(Stage stage) {
    context_.workers->ParallelFor(
        static_cast<int64_t>(items_.size()), false, [&](int64_t item, int32_t worker) {
          SealedJob* job = items_[item].job;
          const int32_t first = items_[item].split * job->split_pages;
          const int32_t end = std::min(job->num_pages, first + job->split_pages);
          (this->*stage)(job, items_[item].split, first, end, worker);
        });
  }
  template <class Stage>
  void ForJobs(Stage stage) {
    context_.workers->ParallelFor(static_cast<int64_t>(jobs_.size()), false,
                                  [&](int64_t item, int32_t worker) {
                                    stage(&jobs_[item], &(*context_.sealed_scratch)[worker].arena);
                                  });
  }

  void ScanPages(SealedJob* job, int32_t split, int32_t first, int32_t end, int32_t worker);
  void ScanRest(SealedJob* job, int32_t split, int32_t first, int32_t end, int32_t worker);
  void ScanPage(SealedJob* job, int32_t page, int32_t next, int32_t chunk_begin, KeyDepth depth,
                int32_t worker, int64_t* bytes);
  void AttendPages(SealedJob* job, int32_t split, int32_t first, int32_t end, int32_t worker);
  void AttendPage(SealedJob* job, int32_t split, int32_t page, int32_t worker);
  void Finish(SealedJob* job);
  std::vector<std::unique_ptr<BoundedHead>> PlanBounded();
  bool SettleAll(const std::vector<std::unique_ptr<BoundedHead>>& bounded);

  void AttendMeans(SealedJob* job, int32_t split, const int32_t* pages, int32_t count,
                   int32_t worker);
  void PrefetchPage(const SealedJob& job, int32_t page) const;
  // What the rows see of the page; null: all of it.
  const KeyRange* Visible(const SealedJob& job, int32_t page, int32_t worker);
  int32_t all_chunks() const { return NumRankChunks(head_dim_); }

  const CpuContext context_;
  const int32_t head_dim_;
  const int32_t group_;
  const AttentionShape shape_;
  const AttendBatch& batch_;
  std::vector<SealedJob> jobs_;
  std::vector<SplitItem> items_;
  bool two_stage_ = false;
};

void Wave::Add(HeadJob* head, PageRange pages) {
  const SequenceStep& sequence = *head->sequence;
  const DecisionParams& params = sequence.decision;
  Arena* arena = context_.wave_arena;
  SealedJob job;
  job.head = head;
  job.layout = MakePageLayout(shape_, sequence.stored_bits);
  job.sections = FindSections(job.layout, head_dim_, head->kv_head);
  job.first_page = pages.first;
  job.num_pages = pages.end - pages.first;
  job.ladder = UsesLadder(params.policy);
  job.fixed = params.policy == Policy::kStatic
                  ? StaticDepth(params, head_dim_, sequence.stored_bits)
                  : FullDepth(head_dim_, sequence.stored_bits);
  const int32_t coarse = job.ladder ? CoarseChunks(params, head_dim_) : 0;
  job.first_chunks = coarse > 0 ? coarse : all_chunks();
  two_stage_ |= coarse > 0;
  job.stride = WholeVectors(job.num_pages);
  job.whole = WholePages(*head, pages);
  const int64_t cells = int64_t{job.stride} * head->rows;
  job.raw = arena->Get<float>(int64_t{job.num_pages} * head->rows * kPageTokens);
  job.scans = NewScans(cells, arena);
  job.masses = arena->Get<float>(cells);
  job.facts = arena->Get<PageFacts>(job.num_pages);
  job.means = arena->Get<PageMean>(job.num_pages);
  job.spreads = arena->GetZeroed<float>(job.stride);
  job.scale_rms = arena->GetZeroed<float>(job.stride);
  job.depths = arena->Get<PageDepth>(job.num_pages);
  job.row_lse = arena->Get<float>(head->rows);
  job.row_max = arena->Get<float>(head->rows);
  job.split_pages = static_cast<int32_t>(SplitPages(job.num_pages));
  job.num_splits = (job.num_pages + job.split_pages - 1) / job.split_pages;
  job.splits = arena->Get<PartialRows>(job.num_splits);
  job.split_key_bytes = arena->GetZeroed<int64_t>(job.num_splits);
  job.split_value_bytes = arena->GetZeroed<int64_t>(job.num_splits);
  if (params.bounded) {
    job.raw_bits = arena->Get<uint8_t>(job.num_pages);
    std::fill_n(job.raw_bits, job.num_pages, static_cast<uint8_t>(kScanBits));
    job.exact = arena->GetZeroed<uint8_t>(job.num_pages);
    job.estimate = arena->Get<float>(int64_t{head->rows} * head_dim_);
  }
  for (int32_t split = 0; split < job.num_splits; ++split) {
    job.splits[split].max = arena->Get<float>(head->rows);
    job.splits[split].sum = arena->Get<float>(head->rows);
    job.splits[split].moment = nullptr;
    job.splits[split].acc = arena->Get<float>(int64_t{head->rows} * head_dim_);
  }
  jobs_.push_back(job);
}

void Wave::Run(StageTimes* times) {
  for (SealedJob& job : jobs_) {
    for (int32_t split = 0; split < job.num_splits; ++split) items_.push_back({&job, split});
  }
  const absl::Time start = absl::Now();
  ForSplits(&Wave::ScanPages);
  if (two_stage_) {
    ForJobs([](SealedJob* job, Arena* arena) {
      if (!TwoStage(*job)) return;
      FinishMasses(job);
      OpenPages(job, arena);
    });
    ForSplits(&Wave::ScanRest);
  }
  const absl::Time scanned = absl::Now();
  ForJobs([this](SealedJob* job, Arena* arena) {
    FinishMasses(job);
    SelectDepths(job, shape_, context_.pool, arena);
  });
  const std::vector<std::unique_ptr<BoundedHead>> bounded = PlanBounded();
  const absl::Time selected = absl::Now();
  do {
    ForSplits(&Wave::AttendPages);
  } while (!SettleAll(bounded));
  times->scan += scanned - start;
  times->select += selected - scanned;
  times->attend += absl::Now() - selected;
}

// Of each job; null where it is not bounded.
std::vector<std::unique_ptr<BoundedHead>> Wave::PlanBounded() {
  std::vector<std::unique_ptr<BoundedHead>> bounded(jobs_.size());
  const bool any = std::any_of(jobs_.begin(), jobs_.end(),
                               [](const SealedJob& job) { return job.exact != nullptr; });
  if (!any) return bounded;
  context_.workers->ParallelFor(
      static_cast<int64_t>(jobs_.size()), false, [&](int64_t item, int32_t worker) {
        SealedJob& job = jobs_[item];
        if (job.exact == nullptr) return;
        bounded[item] = std::make_unique<BoundedHead>(context_, batch_, job.head, &job);
        bounded[item]->Plan(&(*context_.sealed_scratch)[worker]);
      });
  return bounded;
}

// Joins what was attended; true: no head has more to read.
bool Wave::SettleAll(const std::vector<std::unique_ptr<BoundedHead>>& bounded) {
  context_.workers->ParallelFor(
      static_cast<int64_t>(jobs_.size()), false, [&](int64_t item, int32_t worker) {
        SealedJob* job = &jobs_[item];
        if (job->done) return;
        if (bounded[item] != nullptr) bounded[item]->Restart();
        Finish(job);
        job->done = true;
        if (bounded[item] == nullptr) return;
        bounded[item]->AttendExactPages(&(*context_.scratch)[worker]);
        job->done = bounded[item]->Settle(&(*context_.sealed_scratch)[worker]);
      });
  return std::all_of(jobs_.begin(), jobs_.end(), [](const SealedJob& job) { return job.done; });
}

const KeyRange* Wave::Visible(const SealedJob& job, int32_t page, int32_t worker) {
  if (page >= job.whole.first && page < job.whole.end) return nullptr;
  std::vector<KeyRange>& visible = (*context_.sealed_scratch)[worker].visible;
  visible.resize(static_cast<size_t>(job.head->rows));
  LocalRanges(*job.head, group_, job.first_page + page, visible.data());
  return visible.data();
}

// Reads `depth` of the page from `chunk_begin` on and brings its scans up to date; page `next` is
// to follow.
void Wave::ScanPage(SealedJob* job, int32_t page, int32_t next, int32_t chunk_begin, KeyDepth depth,
                    int32_t worker, int64_t* bytes) {
  SealedWorker& own = (*context_.sealed_scratch)[worker];
  const SequenceStep& sequence = *job->head->sequence;
  const RotatedRows rows = JobRows(*job, head_dim_, page);
  const SealedPage view = JobPage(*job, context_.pool, page);
  const ScoreParams params{sequence.softmax_scale, sequence.softcap};
  float* raw = job->raw + int64_t{page} * rows.rows * kPageTokens;
  own.floats.resize(static_cast<size_t>(2) * rows.rows);
  const RowEnergy energy{own.floats.data(), own.floats.data() + rows.rows};

  ScanKeys(view, JobPage(*job, context_.pool, next), rows, chunk_begin, depth.chunks, &own.scratch,
           raw, energy);
  if (chunk_begin == 0) *bytes += head_dim_;  // the scales
  *bytes += int64_t{ChunkedRank(head_dim_, depth.chunks) - ChunkedRank(head_dim_, chunk_begin)} *
            kPageTokens / 2;
  if (depth.bits > kScanBits) {
    RefineKeys(view, rows, depth.bits, depth.chunks, &own.scratch, raw);
    *bytes += int64_t{ChunkedRank(head_dim_, depth.chunks)} * kPageTokens * (depth.bits - 4) / 8;
  }
  const RowScans& scans = job->scans;
  PageStatistics(rows, params, Visible(*job, page, worker), raw,
                 PageSums{scans.max + page, scans.sum + page, scans.squares + page, job->stride});
  for (int32_t row = 0; row < rows.rows; ++row) {
    const int64_t at = int64_t{row} * job->stride + page;
    if (chunk_begin == 0) scans.total[at] = energy.total[row];
    // The second stage reads what the first left.
    scans.read[at] = chunk_begin == 0 ? energy.read[row] : scans.total[at];
  }
}

void Wave::ScanPages(SealedJob* job, int32_t split, int32_t first, int32_t end, int32_t worker) {
  KeyDepth depth = job->fixed.key;
  if (job->ladder) depth = KeyDepth{kScanBits, static_cast<uint8_t>(job->first_chunks)};
  for (int32_t page = first; page < end; ++page) {
    ScanPage(job, page, std::min(page + 1, end - 1), 0, depth, worker,
             &job->split_key_bytes[split]);
    PageFacts& facts = job->facts[page];
    facts = PageFacts();
    facts.sink = job->first_page + page == 0;
    // It will be read at full depth, its first value already while depths are chosen.
    const int32_t stored_bits = job->head->sequence->stored_bits;
    if (facts.sink) {
      PrefetchAttended(JobPage(*job, context_.pool, page), head_dim_, 0, stored_bits);
    }
    const KeyRange* visible = Visible(*job, page, worker);
    for (int32_t row = 0; visible != nullptr && row < job->head->rows; ++row) {
      const int64_t count = visible[row].end - visible[row].begin;
      facts.cut |= count > 0 && count < kPageTokens;
    }
    job->means[page] = ViewPageMean(JobPage(*job, context_.pool, page));
    job->spreads[page] = job->means[page].summary.spread;
    job->scale_rms[page] = job->means[page].summary.scale_rms;
  }
  FinishScans(job, first, end);
  if (!TwoStage(*job)) SumMeans(job, head_dim_, split, first, end);
}

void Wave::ScanRest(SealedJob* job, int32_t split, int32_t first, int32_t end, int32_t worker) {
  if (!TwoStage(*job)) return;
  const KeyDepth depth{kScanBits, static_cast<uint8_t>(all_chunks())};
  const auto next_opened = [&](int32_t page) {
    while (page < end && !job->facts[page].opened) ++page;
    return page;
  };
  for (int32_t page = next_opened(first); page < end;) {
    const int32_t next = next_opened(page + 1);
    ScanPage(job, page, next < end ? next : page, job->first_chunks, depth, worker,
             &job->split_key_bytes[split]);
    page = next;
  }
  FinishScans(job, first, end);
  SumMeans(job, head_dim_, split, first, end);
}

void Wave::AttendPages(SealedJob* job, int32_t split, int32_t first, int32_t end, int32_t worker) {
  if (job->done) return;
  const int32_t rows = job->head->rows;
  const PartialRows& state = job->splits[split];
  // The estimate of the global LSE is as good a reference as the maximum, and known to all splits.
  // The scan's sum of means cannot be kept and attended pages taken out of it: where keys read
  // deeper move a page's mass by orders of magnitude, what is left would be rounding.
  std::copy_n(job->row_lse, rows, state.max);
  std::fill_n(state.sum, rows, 0.0f);
  std::fill_n(state.acc, int64_t{rows} * head_dim_, 0.0f);
  int32_t skipped[kMeansAtOnce], count = 0, last = -1;
  // Each page is attended once its successor has been asked for.
  for (int32_t page = first; page < end; ++page) {
    if (job->exact != nullptr && job->exact[page] != 0) continue;
    if (job->depths[page].value_bits == 0) {
      skipped[count++] = page;
      if (count == kMeansAtOnce) {
        AttendMeans(job, split, skipped, std::exchange(count, 0), worker);
      }
      continue;
    }
    PrefetchPage(*job, page);
    if (last >= 0) AttendPage(job, split, last, worker);
    last = page;
  }
  if (last >= 0) AttendPage(job, split, last, worker);
  AttendMeans(job, split, skipped, count, worker);
}

void Wave::PrefetchPage(const SealedJob& job, int32_t page) const {
  const PageDepth& depth = job.depths[page];
  const bool refine = job.ladder && job.raw_bits == nullptr;
  PrefetchAttended(JobPage(job, context_.pool, page), head_dim_, refine ? depth.key.bits : 0,
                   depth.value_bits);
}

// Some pages by their means, at the masses that the scan found.
void Wave::AttendMeans(SealedJob* job, int32_t split, const int32_t* pages, int32_t count,
                       int32_t worker) {
  if (count == 0) return;
  SealedWorker& own = (*context_.sealed_scratch)[worker];
  const PartialRows& state = job->splits[split];
  const int32_t rows = job->head->rows;
  PageMean means[kMeansAtOnce];
  for (int32_t i = 0; i < count; ++i) means[i] = job->means[pages[i]];
  own.floats.resize(static_cast<size_t>(rows) * kMeansAtOnce);
  for (int32_t row = 0; row < rows; ++row) {
    float* weights = own.floats.data() + int64_t{row} * kMeansAtOnce;
    // A row that sees nothing of a page may have no maximum either.
    const bool sees = job->row_max[row] > kNegativeInfinity;
    const float scale = sees ? std::exp(job->row_max[row] - state.max[row]) : 0.0f;
    for (int32_t i = 0; i < count; ++i) {
      weights[i] = scale * job->masses[int64_t{row} * job->stride + pages[i]];
      state.sum[row] += weights[i];
    }
  }
  AddValueMeans(means, count, head_dim_, own.floats.data(), kMeansAtOnce, rows, state.acc);
}

void Wave::AttendPage(SealedJob* job, int32_t split, int32_t page, int32_t worker) {
  SealedWorker& own = (*context_.sealed_scratch)[worker];
  const SequenceStep& sequence = *job->head->sequence;
  const PageDepth& depth = job->depths[page];
  const PartialRows& state = job->splits[split];
  const SealedPage view = JobPage(*job, context_.pool, page);
  const RotatedRows rotated = JobRows(*job, head_dim_, page);
  float* raw = job->raw + int64_t{page} * rotated.rows * kPageTokens;
  if (job->ladder && depth.key.bits > kScanBits && job->raw_bits == nullptr) {
    RefineKeys(view, rotated, depth.key.bits, depth.key.chunks, &own.scratch, raw);
    job->split_key_bytes[split] +=
        int64_t{ChunkedRank(head_dim_, depth.key.chunks)} * kPageTokens * (depth.key.bits - 4) / 8;
  }
  const ScoreParams params{sequence.softmax_scale, sequence.softcap};
  AttendSealedPage(view, rotated, params, Visible(*job, page, worker), raw, depth.value_bits,
                   &own.scratch, state);
  job->split_value_bytes[split] += int64_t{kPageTokens} * ValueGroups(head_dim_) +
                                   int64_t{head_dim_} * kPageTokens * depth.value_bits / 8;
}

// Joins the splits in their order, turns the values back and hands the state to the head.
void Wave::Finish(SealedJob* job) {
  HeadJob* head = job->head;
  const int32_t rows = head->rows;
  WeightedPartial& target = head->splits[head->num_splits];
  target.factor = 1;
  target.key_bytes = 0;
  PartialRows& sum = target.rows;
  sum.moment = nullptr;
  for (int32_t row = 0; row < rows; ++row) {
    sum.max[row] = kNegativeInfinity;
    for (int32_t split = 0; split < job->num_splits; ++split) {
      sum.max[row] = std::max(sum.max[row], job->splits[split].max[row]);
    }
    sum.sum[row] = 0;
    float* acc = sum.acc + int64_t{row} * head_dim_;
    std::fill_n(acc, head_dim_, 0.0f);
    for (int32_t split = 0; split < job->num_splits; ++split) {
      const PartialRows& part = job->splits[split];
      if (part.sum[row] == 0) continue;
      const float weight = std::exp(part.max[row] - sum.max[row]);
      sum.sum[row] += weight * part.sum[row];
      AddScaled(part.acc + int64_t{row} * head_dim_, weight, head_dim_, acc);
    }
    if (sum.sum[row] == 0) sum.max[row] = kNegativeInfinity;
    RotateHadamard(acc, head_dim_);
  }
  for (int32_t split = 0; split < job->num_splits; ++split) {
    head->decision->key_bytes += job->split_key_bytes[split];
    head->decision->value_bytes += job->split_value_bytes[split];
    job->split_key_bytes[split] = job->split_value_bytes[split] =
        0;  // Attended again: added again.
  }
  ++head->num_splits;
}

}  // namespace

void AttendSealed(const CpuContext& context, const AttendBatch& batch, absl::Span<HeadJob> heads,
                  StageTimes* times) {
  size_t next = 0;
  while (next < heads.size()) {
    Wave wave(context, batch);
    context.wave_arena->Reset();
    int64_t score_bytes = 0;
    bool any = false;
    for (; next < heads.size(); ++next) {
      const PageRange pages = VisibleSealedPages(heads[next]);
      if (pages.first >= pages.end) continue;
      score_bytes += int64_t{pages.end - pages.first} * heads[next].rows * kPageTokens *
                     static_cast<int64_t>(sizeof(float));
      if (any && score_bytes > kWaveScoreBytes) break;
      wave.Add(&heads[next], pages);
      any = true;
    }
    if (any) wave.Run(times);
  }
}

}  // namespace adaattn

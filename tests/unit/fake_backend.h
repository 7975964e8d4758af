#ifndef ADAATTN_TESTS_UNIT_FAKE_BACKEND_H_
#define ADAATTN_TESTS_UNIT_FAKE_BACKEND_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/attention.h"
#include "kernels/format/float_types.h"
#include "kernels/mutex.h"

namespace adaattn {

// A backend whose arithmetic a test can do in its head. A page, dense or sealed, begins with one
// float per token: the first element of the token's k. "Attention" of a row is the sum of those of
// the tokens it sees, in every element of out; its lse is their number. Memory that nobody wrote is
// NaN, so a wrong page table shows. Every call is recorded.
class FakeBackend final : public Backend {
 public:
  explicit FakeBackend(int64_t pool_bytes, int64_t exact_tier_bytes = 0)
      : pool_(static_cast<size_t>(pool_bytes + exact_tier_bytes) / sizeof(float),
              std::numeric_limits<float>::quiet_NaN()) {
    info_.name = "fake";
    info_.head_dims = {64};
    info_.formats = {PageFormat::kF32, PageFormat::kBf16, PageFormat::kProgressive,
                     PageFormat::kProgressiveF16};
    info_.max_group_size = 16;
    info_.max_q_len = 64;
    info_.pool_bytes = pool_bytes;
    info_.exact_tier_bytes = exact_tier_bytes;
    info_.bounds_errors = true;
  }

  // From any thread.
  int64_t CountCalls(const std::string& prefix) const {
    MutexLock lock(&mutex_);
    return std::count_if(calls_.begin(), calls_.end(),
                         [&](const std::string& call) { return call.rfind(prefix, 0) == 0; });
  }
  // Runs at the start of each RunAttend, on the engine thread.
  void set_on_run(std::function<void()> on_run) { on_run_ = std::move(on_run); }
  void set_run_status(absl::Status status) { run_status_ = std::move(status); }
  void set_drift_ratio(float drift_ratio) { drift_ratio_ = drift_ratio; }
  // Before an engine runs.
  void set_seal_crossovers(std::vector<SealCrossover> crossovers) {
    info_.seal_crossovers = std::move(crossovers);
  }
  const std::vector<DecisionParams>& decisions() const { return decisions_; }
  // That each of them came with.
  const std::vector<std::vector<float>>& thetas() const { return thetas_; }
  int64_t fit_rows() const { return fit_rows_; }
  // Originals that the last sequence came with.
  int64_t exact_pages() const { return exact_pages_; }

  const BackendInfo& info() const override { return info_; }

  absl::StatusOr<std::unique_ptr<StepBuffers>> CreateStepBuffers(
      const StepLimits& limits) override {
    return std::make_unique<Buffers>(limits);
  }

  absl::StatusOr<const AttendPlan*> PlanAttend(const AttendBatch& batch) override {
    if (batch.shape.head_dim != 64) return absl::UnimplementedError("head_dim: 64 is supported");
    return &plan_;
  }

  absl::StatusOr<StepTicket> RunAttend(const AttendPlan& /*plan*/,
                                       const AttendBatch& batch) override {
    if (on_run_) on_run_();
    Record(absl::StrCat("run ", PageFormatName(batch.format), " ", batch.sequences.size()));
    if (!run_status_.ok()) return run_status_;
    int64_t q_row = 0, kv_row = 0;
    for (size_t i = 0; i < batch.sequences.size(); ++i) {
      const SequenceStep& sequence = batch.sequences[i];
      decisions_.push_back(sequence.decision);
      thetas_.emplace_back(sequence.thetas.begin(), sequence.thetas.end());
      exact_pages_ = static_cast<int64_t>(sequence.exact_pages.size());
      batch.buffers->results()[i] = {};
      Append(batch, sequence, kv_row, &batch.buffers->results()[i]);
      Attend(batch, sequence, i, q_row);
      q_row += sequence.q_len;
      kv_row += sequence.append_len;
    }
    return StepTicket{1};
  }

  absl::Status Wait(StepTicket /*ticket*/) override { return absl::OkStatus(); }

  absl::Status SealPages(absl::Span<const SealTask> tasks,
                         absl::Span<SealResult> results) override {
    for (size_t i = 0; i < tasks.size(); ++i) {
      Record("seal");
      std::copy_n(At(tasks[i].source), kPageTokens, At(tasks[i].target));
      if (tasks[i].exact_copy != kNoPage) {
        Record("keep");
        std::copy_n(At(tasks[i].source), kPageTokens, At(tasks[i].exact_copy));
      }
      results[i].drift_ratio = drift_ratio_;
    }
    return run_status_;
  }
  absl::Status ReopenPages(absl::Span<const ReopenTask> tasks) override {
    for (const ReopenTask& task : tasks) {
      Record("reopen");
      std::copy_n(At(task.source), kPageTokens, At(task.target));
    }
    return run_status_;
  }
  absl::Status FitBasis(const FitBasisTask& task) override {
    Record(absl::StrCat("fit ", task.pages.size()));
    fit_rows_ = static_cast<int64_t>(task.query_sample.size()) / task.shape.num_q_heads /
                task.shape.head_dim;
    *At(task.target) = 0;
    return run_status_;
  }
  absl::Status LoadBasis(const LoadBasisTask& task) override {
    Record("load");
    *At(task.target) = 0;
    return run_status_;
  }
  absl::Status ReadTokens(const ReadTask& task) override {
    Record(absl::StrCat("read ", PageFormatName(task.format), " ", task.num_sealed_pages));
    const int64_t row = int64_t{task.shape.num_kv_heads} * task.shape.head_dim;
    for (int64_t token = task.begin; token < task.end; ++token) {
      const float value = *TokenAt(task.pages, token);
      std::fill_n(task.k + (token - task.begin) * row, row, value);
      std::fill_n(task.v + (token - task.begin) * row, row, value);
    }
    return run_status_;
  }
  absl::Status CopyPage(PageId source, PageId target, int64_t bytes) override {
    Record("copy");
    std::memmove(At(target), At(source), static_cast<size_t>(bytes));
    return run_status_;
  }
  absl::Status ZeroPage(PageId page, int64_t bytes) override {
    Record(PageOffset(page) < info_.pool_bytes ? "zero" : "zero tier");
    std::memset(At(page), 0, static_cast<size_t>(bytes));
    return run_status_;
  }

 private:
  void Record(std::string call) {
    MutexLock lock(&mutex_);
    calls_.push_back(std::move(call));
  }

  class Plan final : public AttendPlan {
   public:
    std::string DebugString() const override { return "fake"; }
  };

  class Buffers final : public StepBuffers {
   public:
    explicit Buffers(const StepLimits& limits)
        : limits_(limits),
          q_(limits.max_q_bytes),
          k_(limits.max_kv_bytes),
          v_(limits.max_kv_bytes),
          out_(limits.max_q_bytes),
          lse_(limits.max_q_rows),
          results_(limits.max_sequences),
          decisions_(limits.max_decisions) {}

    const StepLimits& limits() const override { return limits_; }
    std::byte* q() override { return q_.data(); }
    std::byte* k() override { return k_.data(); }
    std::byte* v() override { return v_.data(); }
    std::byte* out() override { return out_.data(); }
    float* lse() override { return lse_.data(); }
    SequenceResult* results() override { return results_.data(); }
    HeadDecision* decisions() override { return decisions_.data(); }
    StageTimes* stage_times() override { return &times_; }

   private:
    const StepLimits limits_;
    std::vector<std::byte> q_, k_, v_, out_;
    std::vector<float> lse_;
    std::vector<SequenceResult> results_;
    std::vector<HeadDecision> decisions_;
    StageTimes times_;
  };

  float* At(PageId page) { return pool_.data() + PageOffset(page) / sizeof(float); }
  float* TokenAt(absl::Span<const PageId> pages, int64_t token) {
    return At(pages[token / kPageTokens]) + token % kPageTokens;
  }

  void Append(const AttendBatch& batch, const SequenceStep& sequence, int64_t kv_row,
              SequenceResult* result) {
    const int64_t row = int64_t{batch.shape.num_kv_heads} * batch.shape.head_dim;
    for (int64_t i = 0; i < sequence.append_len; ++i) {
      const float k = ReadElement(batch.buffers->k(), batch.in_type, (kv_row + i) * row);
      const float v = ReadElement(batch.buffers->v(), batch.in_type, (kv_row + i) * row);
      *TokenAt(sequence.pages, sequence.kv_len + i) = k;
      if (!IsFiniteFloat(k) || !IsFiniteFloat(v)) result->nonfinite_kv = true;
    }
  }

  void Attend(const AttendBatch& batch, const SequenceStep& sequence, size_t index, int64_t q_row) {
    const int64_t row = int64_t{batch.shape.num_q_heads} * batch.shape.head_dim;
    const int64_t end = sequence.kv_len + sequence.append_len;
    for (int64_t i = 0; i < sequence.q_len; ++i) {
      if (!IsFiniteFloat(ReadElement(batch.buffers->q(), batch.in_type, (q_row + i) * row))) {
        batch.buffers->results()[index].nonfinite_q = true;
      }
      float sum = 0;
      int64_t seen = 0;
      for (int64_t token = 0; token < std::min(end, sequence.q_start + i + 1); ++token, ++seen) {
        sum += *TokenAt(sequence.pages, token);
      }
      for (int64_t c = 0; c < row; ++c) {
        WriteElement(batch.buffers->out(), batch.out_type, (q_row + i) * row + c, sum);
      }
      std::fill_n(batch.buffers->lse() + (q_row + i) * batch.shape.num_q_heads,
                  batch.shape.num_q_heads, static_cast<float>(seen));
    }
    HeadDecision decision = {};
    if (sequence.q_len > 0) {
      decision.key_pages[KeyDepthIndex(8, NumRankChunks(batch.shape.head_dim))] =
          sequence.num_sealed_pages;
      decision.value_pages[4] = sequence.num_sealed_pages;
      decision.dense_tokens =
          static_cast<int32_t>(end - int64_t{sequence.num_sealed_pages} * kPageTokens);
      decision.theta = 0.25f;
      decision.predicted_error = 0.5f;
      if (sequence.decision.bounded) {
        decision.theta = 0.125f;
        decision.predicted_error = 0;
        decision.error_bound = 0.25f;
      }
    }
    std::fill_n(batch.buffers->decisions() + index * batch.shape.num_kv_heads,
                batch.shape.num_kv_heads, decision);
  }

  BackendInfo info_;
  Plan plan_;
  std::vector<float> pool_;
  mutable Mutex mutex_;
  std::vector<std::string> calls_ ABSL_GUARDED_BY(mutex_);
  std::vector<DecisionParams> decisions_;
  std::vector<std::vector<float>> thetas_;
  std::function<void()> on_run_;
  absl::Status run_status_;
  float drift_ratio_ = 1;
  int64_t fit_rows_ = 0;
  int64_t exact_pages_ = 0;
};

}  // namespace adaattn

#endif  // ADAATTN_TESTS_UNIT_FAKE_BACKEND_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/format/float_types.h"
#include "server/batch_runner.h"
#include "server/decision_summary.h"

// The way back: outputs, outcomes, reports and replies.

namespace adaattn {
namespace {

// Pages come free when sessions end or are sealed, which takes longer than a batch.
constexpr absl::Duration kRetryAfter = absl::Milliseconds(50);

struct ReplyRows {
  std::byte* out = nullptr;
  int64_t out_bytes = 0;
  std::byte* lse = nullptr;
  int64_t lse_bytes = 0;
};

// The rows of `step` in its task's reply. The buffer is const only to those it is handed to.
ReplyRows RowsOf(const Step& step) {
  const AttentionTask& task = *step.task;
  const int64_t out_row =
      int64_t{task.shape.num_q_heads} * task.shape.head_dim * DTypeBytes(task.out_type);
  const int64_t lse_row = task.shape.num_q_heads * static_cast<int64_t>(sizeof(float));
  std::byte* const bytes = task.reply.buffer->bytes.get();
  ReplyRows rows;
  rows.out = bytes + step.task_q_row * out_row;
  rows.out_bytes = step.q_len() * out_row;
  rows.lse = bytes + task.reply.buffer->out_bytes + step.task_q_row * lse_row;
  rows.lse_bytes = step.q_len() * lse_row;
  return rows;
}

void FillFailedRows(const Step& step) {
  if (step.q_len() == 0) return;
  const ReplyRows rows = RowsOf(step);
  std::memset(rows.out, 0, static_cast<size_t>(rows.out_bytes));
  const float lse = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < rows.lse_bytes; i += sizeof(lse)) {
    std::memcpy(rows.lse + i, &lse, sizeof(lse));
  }
}

}  // namespace

void BatchRunner::MakeReplyBuffer(AttentionTask* task) {
  const int64_t rows = task->q_rows();
  if (rows == 0) return;
  auto buffer = std::make_shared<ReplyBuffer>();
  buffer->out_bytes =
      rows * task->shape.num_q_heads * task->shape.head_dim * DTypeBytes(task->out_type);
  buffer->lse_bytes = rows * task->shape.num_q_heads * static_cast<int64_t>(sizeof(float));
  buffer->bytes.reset(new std::byte[buffer->out_bytes + buffer->lse_bytes]);
  task->reply.buffer = std::move(buffer);
}

absl::Status BatchRunner::RefuseValue(const Step& step, const AttendBatch& batch,
                                      const SequenceResult& result) const {
  const int32_t d = shape_.head_dim;
  const auto find = [&](const char* name, const std::byte* rows, int64_t first_row,
                        int32_t num_rows, int32_t num_heads, float most) {
    const int64_t row = int64_t{num_heads} * d;
    for (int64_t i = 0; i < num_rows * row; ++i) {
      const float value = ReadElement(rows, batch.in_type, first_row * row + i);
      if (std::abs(value) <= most) continue;
      return absl::StrCat(name, "[", i / row, ", ", i % row / d, ", ", i % d, "]: ", value);
    }
    return std::string();
  };
  const DType type = DenseDType(batch.format);
  std::string found;
  if (result.nonfinite_q) {
    found = find("q", buffers_->q(), step.run_q_row, step.q_len(), shape_.num_q_heads, kFloatMax);
  } else {
    const float most = LargestStored(type);
    found = find("k", buffers_->k(), step.run_kv_row, step.append_len, shape_.num_kv_heads, most);
    if (found.empty()) {
      found = find("v", buffers_->v(), step.run_kv_row, step.append_len, shape_.num_kv_heads, most);
    }
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "sequences[", step.sequence_idx, "].", found, " is not allowed: only finite values",
      !result.nonfinite_q && type == DType::kF16
          ? " from -65504 to 65504, the range of the session's FP16 pages"
          : "",
      "; nothing was appended"));
}

void BatchRunner::CopyOut(const Step& step, const AttendBatch& batch) {
  const ReplyRows rows = RowsOf(step);
  const int64_t row = int64_t{shape_.num_q_heads} * shape_.head_dim * DTypeBytes(batch.out_type);
  std::memcpy(rows.out, buffers_->out() + step.run_q_row * row,
              static_cast<size_t>(rows.out_bytes));
  std::memcpy(rows.lse, buffers_->lse() + step.run_q_row * shape_.num_q_heads,
              static_cast<size_t>(rows.lse_bytes));
}

void BatchRunner::SettleOutcome(Step* step) {
  SequenceOutcome& outcome = step->task->reply.sequences[step->sequence_idx];
  // Of an import's layers, the first failure is the sequence's.
  if (outcome.status.ok()) outcome.status = step->status;
  if (step->session() != nullptr && !step->session()->closed()) {
    outcome.kv_len = step->state().length;
  }
  outcome.replayed = step->replayed;
  outcome.mode = step->options.mode;
  if (!step->status.ok()) {
    AttentionReply& reply = step->task->reply;
    if (absl::IsUnavailable(step->status) || absl::IsDeadlineExceeded(step->status) ||
        absl::IsCancelled(step->status)) {
      reply.status = step->status;  // Not of this sequence alone.
    }
    if (absl::IsResourceExhausted(step->status)) reply.retry_after = kRetryAfter;
    FillFailedRows(*step);
    return;
  }
  if (step->q_len() == 0) return;
  outcome.attended = true;
  const absl::Span<const HeadDecision> heads(HeadsOf(*step),
                                             static_cast<size_t>(shape_.num_kv_heads));
  const PageFormat format =
      step->exact_table ? DenseFormat(step->task->format) : step->task->format;
  outcome.decision = Summarize(heads, shape_, format, step->options, step->target_raised);
  AttentionReply& reply = step->task->reply;
  reply.detail = step->options.detail;
  if (step->options.detail == DecisionDetail::kPerHead) {
    reply.heads.resize(step->task->sequences.size() * shape_.num_kv_heads);
    std::copy(heads.begin(), heads.end(),
              reply.heads.begin() + step->sequence_idx * shape_.num_kv_heads);
  }
}

void BatchRunner::Report(const Batch& batch, const BatcherLoad& load) {
  BatchReport report;
  report.shape = shape_;
  report.format = batch.tasks.front()->format;
  report.num_tasks = static_cast<int32_t>(batch.tasks.size());
  reports_.clear();
  for (const Step& step : steps_) {
    const SequenceOutcome& outcome = step.task->reply.sequences[step.sequence_idx];
    StepReport& of_step = reports_.emplace_back();
    of_step.code = step.status.code();
    of_step.mode = step.options.mode;
    of_step.policy = step.options.decision.policy;
    of_step.replayed = step.replayed;
    of_step.kv_len = outcome.kv_len;
    of_step.q_len = step.q_len();
    if (!step.status.ok()) continue;
    of_step.appended = step.append_len;
    report.appended_tokens += step.append_len;
    if (step.q_len() == 0) continue;
    report.q_tokens += step.q_len();
    of_step.attended = true;
    of_step.decision = &outcome.decision;
    of_step.heads = {HeadsOf(step), static_cast<size_t>(shape_.num_kv_heads)};
  }
  report.steps = reports_;
  report.queue_times = queue_times_;
  report.times = times_;
  report.total = clock_->Now() - started_;
  report.load = load;
  observer_->OnBatch(report);
}

void BatchRunner::Reply(Batch* batch) {
  for (size_t i = 0; i < batch->tasks.size(); ++i) {
    AttentionReply& reply = batch->tasks[i]->reply;
    reply.times = times_;
    reply.times.queue = queue_times_[i];
    FinishTask(std::move(batch->tasks[i]));
  }
}

}  // namespace adaattn

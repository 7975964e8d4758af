#include "server/attention_task.h"

#include <utility>

namespace adaattn {

const char* FallbackName(Fallback fallback) {
  switch (fallback) {
    case Fallback::kNone:
      return "none";
    case Fallback::kNoBasis:
      return "no_basis";
    case Fallback::kBudget:
      return "budget";
    case Fallback::kPressure:
      return "pressure";
    case Fallback::kStoredBits:
      return "stored_bits";
    case Fallback::kExactPages:
      return "exact_pages";
    case Fallback::kBoundUnmet:
      return "bound_unmet";
  }
  return "unknown";
}

int64_t TensorPieces::bytes() const {
  int64_t bytes = 0;
  for (const auto& piece : pieces) bytes += static_cast<int64_t>(piece.size());
  return bytes;
}

DType AttentionTask::in_type() const {
  const DType type = q.pieces.empty() ? k.type : q.type;
  return type == DType::kF8E4m3 ? DType::kF16 : type;
}

int64_t AttentionTask::q_rows() const {
  int64_t rows = 0;
  for (const SequenceTask& sequence : sequences) rows += sequence.q_len;
  return rows;
}

int64_t AttentionTask::appended_rows() const {
  int64_t rows = 0;
  for (const SequenceTask& sequence : sequences) rows += sequence.append_len;
  return rows * num_layers;
}

void FinishTask(std::unique_ptr<AttentionTask> task) {
  for (const SequenceTask& sequence : task->sequences) {
    if (sequence.session != nullptr) sequence.session->TaskEnds();
  }
  // The task owns the function, and the function gets the task.
  const auto done = std::move(task->done);
  done(std::move(task));
}

void FailTask(std::unique_ptr<AttentionTask> task, const absl::Status& status,
              absl::Duration retry_after) {
  task->reply = AttentionReply();
  task->reply.status = status;
  task->reply.retry_after = retry_after;
  FinishTask(std::move(task));
}

}  // namespace adaattn

#include "server/batch_runner.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/feedback_state.h"
#include "kernels/format/float_types.h"
#include "server/payload_reader.h"

namespace adaattn {
namespace {

// Slices of sealing that one reservation may wait for while the pool is full.
constexpr int kMaxSlicesForRoom = 256;

// Rows of q, k and v in the smallest head and type, so that limits in bytes bound limits in rows.
constexpr int64_t kSmallestHeadBytes = 64 * 2;

}  // namespace

BatchRunner::BatchRunner(const BatchRunnerOptions& options, KvCache* cache, Sealer* sealer,
                         Auditor* auditor, EngineObserver* observer, const Clock* clock)
    : options_(options),
      backend_(cache->backend()),
      cache_(cache),
      sealer_(sealer),
      auditor_(auditor),
      observer_(observer),
      clock_(clock) {}

absl::Status BatchRunner::CreateBuffers() {
  StepLimits limits;
  limits.max_sequences = options_.limits.max_batch_sequences;
  limits.max_q_bytes = options_.limits.max_batch_q_bytes;
  limits.max_kv_bytes = options_.limits.max_batch_kv_bytes;
  limits.max_q_rows = options_.limits.max_batch_q_bytes / kSmallestHeadBytes;
  limits.max_decisions = options_.limits.max_batch_decisions;
  limits.max_table_entries = options_.max_table_entries;
  absl::StatusOr<std::unique_ptr<StepBuffers>> buffers = backend_->CreateStepBuffers(limits);
  if (!buffers.ok()) return buffers.status();
  buffers_ = *std::move(buffers);
  return absl::OkStatus();
}

absl::Status BatchRunner::Run(Batch* batch, const BatcherLoad& load) {
  started_ = clock_->Now();
  queue_fraction_ = load.fraction;
  device_ = absl::OkStatus();
  times_ = TaskTimes();
  shape_ = batch->tasks.front()->shape;
  ++serial_;
  Expand(batch);
  heads_.assign(steps_.size() * shape_.num_kv_heads, HeadDecision());
  for (Step& step : steps_) {
    if (step.status.ok()) {
      ResolveStep(serial_, queue_fraction_, options_.pressure_threshold, &step);
    }
    if (step.status.ok()) Reserve(&step);
  }
  while (true) {
    CollectRun();
    if (run_.empty()) break;
    RunCollected();
  }
  for (Step& step : steps_) SettleOutcome(&step);
  Report(*batch, load);
  steps_.clear();  // Gives unused reservations back and drops what points into the tasks.
  run_.clear();
  Reply(batch);
  const absl::Status audited = auditor_->RunAll();
  return device_.ok() && absl::IsUnavailable(audited) ? audited : device_;
}

void BatchRunner::Expand(Batch* batch) {
  queue_times_.clear();
  for (const auto& task : batch->tasks) {
    const absl::Duration queued = std::max(started_ - task->enqueued, absl::ZeroDuration());
    queue_times_.push_back(queued);
    times_.queue = std::max(times_.queue, queued);
    task->reply.sequences.resize(task->sequences.size());
    absl::Status status;
    if (IsCancelled(task->cancelled)) {
      status = absl::CancelledError("cancelled in the queue; nothing was done");
    } else if (task->deadline <= started_) {
      status = absl::DeadlineExceededError("the deadline passed in the queue; nothing was done");
    }
    MakeReplyBuffer(task.get());
    int64_t q_row = 0, kv_row = 0;
    for (int32_t i = 0; i < task->num_layers; ++i) {
      for (size_t s = 0; s < task->sequences.size(); ++s) {
        Step& step = steps_.emplace_back();
        step.task = task.get();
        step.sequence_idx = static_cast<int32_t>(s);
        step.layer = task->layer + i;
        step.task_q_row = q_row;
        step.task_kv_row = kv_row;
        step.status = status;
        q_row += task->sequences[s].q_len;
        kv_row += task->sequences[s].append_len;
      }
    }
  }
}

void BatchRunner::Reserve(Step* step) {
  if (step->append_len == 0) return;
  for (int slice = 0; slice < kMaxSlicesForRoom; ++slice) {
    absl::StatusOr<AppendReservation> reservation =
        cache_->ReserveAppend(*step->session(), step->layer, step->append_len);
    if (reservation.ok()) {
      step->reservation = *std::move(reservation);
      return;
    }
    step->status = reservation.status();
    if (!absl::IsResourceExhausted(step->status)) break;
    if (sealer_->idle() && !sealer_->QueueAll()) break;
    // Sealing gives back more than it takes: the step waits for a slice of it.
    const absl::StatusOr<SealReport> sealed = sealer_->RunSlice();
    if (!sealed.ok()) {
      step->status = sealed.status();
      break;
    }
    observer_->OnSeal(*sealed);
    if (sealed->pages_sealed == 0 && sealed->bases_fitted == 0) {
      if (!sealed->deferred_why.empty()) {
        step->status = absl::ResourceExhaustedError(absl::StrCat(
            step->status.message(), "; sealing cannot make room: ", sealed->deferred_why));
      }
      break;
    }
    step->status = absl::OkStatus();
  }
  if (absl::IsUnavailable(step->status)) device_ = step->status;
}

void BatchRunner::CollectRun() {
  run_.clear();
  int64_t entries = 0;
  for (Step& step : steps_) {
    if (!step.status.ok() || step.has_run) continue;
    if (!device_.ok()) {
      step.status = device_;
      continue;
    }
    if (!run_.empty() && run_.front()->exact_table != step.exact_table) continue;
    const auto pages =
        static_cast<int64_t>(step.state().pages.size() + step.reservation.lease.pages().size());
    if (pages > options_.max_table_entries) {
      step.status = absl::ResourceExhaustedError(absl::StrCat(
          "the sequence has ", pages, " pages, one batch holds ", options_.max_table_entries));
      continue;
    }
    if (entries + pages > options_.max_table_entries) continue;
    entries += pages;
    step.has_run = true;
    run_.push_back(&step);
  }
}

void BatchRunner::RunCollected() {
  const AttentionTask& first = *run_.front()->task;
  AttendBatch batch;
  batch.shape = shape_;
  batch.format = run_.front()->exact_table ? DenseFormat(first.format) : first.format;
  batch.in_type = first.in_type();
  batch.out_type = first.out_type;
  batch.buffers = buffers_.get();
  const absl::Time begin = clock_->Now();
  CopyIn();
  FillSequences();
  batch.sequences = sequences_;
  const absl::Time copied = clock_->Now();
  times_.copy_in += copied - begin;
  const absl::Status status = Execute(&batch);
  if (!status.ok()) {
    if (absl::IsUnavailable(status)) device_ = status;
    for (Step* step : run_) step->status = status;
    return;
  }
  if (IsProgressive(batch.format)) NoticeStep();
  const StageTimes& stages = *buffers_->stage_times();
  times_.append += stages.append;
  times_.scan += stages.scan;
  times_.select += stages.select;
  times_.attend += stages.attend;
  times_.merge += stages.merge;
  const absl::Time ran = clock_->Now();
  TakeResults(batch);
  times_.copy_out += clock_->Now() - ran;
}

void BatchRunner::NoticeStep() {
  const auto attending =
      std::count_if(run_.begin(), run_.end(), [](const Step* step) { return step->q_len() > 0; });
  if (attending > 0) sealer_->NoticeStep(attending * shape_.num_kv_heads);
}

absl::Status BatchRunner::Execute(AttendBatch* batch) {
  absl::StatusOr<const AttendPlan*> plan = backend_->PlanAttend(*batch);
  if (!plan.ok()) return plan.status();
  absl::StatusOr<StepTicket> ticket = backend_->RunAttend(**plan, *batch);
  if (!ticket.ok()) return ticket.status();
  return backend_->Wait(*ticket);
}

void BatchRunner::CopyIn() {
  std::optional<PayloadReader> q, k, v;
  const AttentionTask* task = nullptr;
  int64_t q_row = 0, kv_row = 0;            // in the run
  int64_t task_q_row = 0, task_kv_row = 0;  // how far the readers are
  for (Step* step : run_) {
    if (step->task != task) {
      task = step->task;
      q.emplace(&task->q, shape_.num_q_heads, shape_.head_dim);
      k.emplace(&task->k, shape_.num_kv_heads, shape_.head_dim);
      v.emplace(&task->v, shape_.num_kv_heads, shape_.head_dim);
      task_q_row = task_kv_row = 0;
    }
    step->run_q_row = q_row;
    step->run_kv_row = kv_row;
    if (step->q_len() > 0) {
      q->Skip(step->task_q_row - task_q_row);
      q->Read(step->q_len(), buffers_->q() + q_row * q->row_bytes());
      task_q_row = step->task_q_row + step->q_len();
      q_row += step->q_len();
      SampleQueries(*step);
    }
    if (step->append_len > 0) {
      k->Skip(step->task_kv_row - task_kv_row);
      v->Skip(step->task_kv_row - task_kv_row);
      k->Read(step->append_len, buffers_->k() + kv_row * k->row_bytes());
      v->Read(step->append_len, buffers_->v() + kv_row * v->row_bytes());
      task_kv_row = step->task_kv_row + step->append_len;
      kv_row += step->append_len;
    }
  }
}

void BatchRunner::SampleQueries(const Step& step) {
  const SessionConfig& config = step.session()->config();
  LayerState& state = step.state();
  if (!IsProgressive(config.format) || config.profile != nullptr || !state.bases.empty() ||
      step.replayed) {
    return;
  }
  const int32_t row_size = shape_.num_q_heads * shape_.head_dim;
  const DType type = step.task->in_type();
  for (int32_t row = 0; row < step.q_len(); ++row) {
    const int32_t slot = state.queries.NextSlot();
    if (slot < 0) continue;
    float* const target = state.queries.Slot(slot, row_size);
    const int64_t begin = (step.run_q_row + row) * row_size;
    for (int32_t i = 0; i < row_size; ++i) {
      const float value = ReadElement(buffers_->q(), type, begin + i);
      target[i] = IsFiniteFloat(value) ? value : 0;  // The step is refused; the fit must not be.
    }
  }
}

void BatchRunner::FillSequences() {
  sequences_.clear();
  tables_.clear();
  size_t entries = 0;
  for (const Step* step : run_) {
    entries += step->state().pages.size() + step->reservation.lease.pages().size();
  }
  tables_.reserve(entries);  // The spans below point into it, as into the next.
  thetas_.resize(run_.size() * shape_.num_kv_heads);
  for (const Step* step : run_) {
    const SessionConfig& config = step->session()->config();
    const LayerState& state = step->state();
    SequenceStep& sequence = sequences_.emplace_back();
    sequence.kv_len = state.length;
    sequence.append_len = step->append_len;
    sequence.q_len = step->q_len();
    sequence.q_start = step->q_start;
    if (step->exact_table || !step->reservation.lease.pages().empty()) {
      const size_t begin = tables_.size();
      if (step->exact_table) {
        KvCache::FillExactTable(state, step->reservation, &tables_);
      } else {
        KvCache::FillTable(state, step->reservation, &tables_);
      }
      sequence.pages = absl::MakeConstSpan(tables_).subspan(begin);
    } else {
      sequence.pages = state.pages;
    }
    if (!step->exact_table) {
      sequence.num_sealed_pages = state.num_sealed;
      sequence.bases = KvCache::SealedRuns(state);
      sequence.stored_bits = config.stored_bits;
      sequence.exact_pages = state.exact_pages;
    }
    sequence.softmax_scale = config.softmax_scale;
    sequence.softcap = step->softcap;
    sequence.window = step->window;
    sequence.key_scales = config.layer_key_scales(step->layer);
    sequence.value_scales = config.layer_value_scales(step->layer);
    sequence.decision = step->options.decision;
    if (sequence.decision.policy == Policy::kFeedback) {
      UseFeedback(state.feedback, thetas_.data() + (sequences_.size() - 1) * shape_.num_kv_heads,
                  &sequence);
    }
  }
}

void BatchRunner::TakeResults(const AttendBatch& batch) {
  for (size_t i = 0; i < run_.size(); ++i) {
    Step& step = *run_[i];
    const SequenceResult& result = buffers_->results()[i];
    if (result.nonfinite_q || result.nonfinite_kv) {
      step.status = RefuseValue(step, batch, result);
      continue;
    }
    if (step.append_len > 0) Commit(&step);
    if (step.q_len() == 0) continue;
    HeadDecision* const heads = HeadsOf(step);
    std::copy_n(buffers_->decisions() + i * shape_.num_kv_heads, shape_.num_kv_heads, heads);
    CopyOut(step, batch);
    const DecisionParams& decision = step.options.decision;
    if (decision.policy == Policy::kFeedback && !decision.bounded) {
      FollowFeedback({heads, static_cast<size_t>(shape_.num_kv_heads)},
                     decision.target_relative_error, &step.state().feedback);
    }
    const bool audited = step.options.mode == AttendMode::kStatistical ||
                         step.options.mode == AttendMode::kDeterministic;
    if (audited && IsProgressive(batch.format) && step.state().num_sealed > 0 &&
        auditor_->Samples()) {
      KeepForAudit(step, batch);
    }
  }
}

HeadDecision* BatchRunner::HeadsOf(const Step& step) {
  return heads_.data() + (&step - steps_.data()) * shape_.num_kv_heads;
}

void BatchRunner::Commit(Step* step) {
  LayerState& state = step->state();
  state.last_position = state.length;
  state.last_step_id = step->sequence().step_id;
  // An import is replayed by its position; its step has no id.
  state.last_append_len = step->task->is_import ? 0 : step->append_len;
  cache_->CommitAppend(step->session(), step->layer, step->append_len,
                       std::move(step->reservation));
  sealer_->Notice(step->sequence().session, step->layer);
}

void BatchRunner::KeepForAudit(const Step& step, const AttendBatch& batch) {
  const int64_t elements = int64_t{step.q_len()} * shape_.num_q_heads * shape_.head_dim;
  const int64_t begin = step.run_q_row * shape_.num_q_heads * shape_.head_dim;
  AuditStep audit;
  audit.session = step.sequence().session;
  audit.layer = step.layer;
  audit.in_type = batch.in_type;
  audit.out_type = batch.out_type;
  audit.q_len = step.q_len();
  audit.q_start = step.q_start;
  audit.window = step.window;
  audit.softcap = step.softcap;
  audit.deterministic = step.options.mode == AttendMode::kDeterministic;
  audit.budget = !audit.deterministic && FollowsBudget(step.options.decision.policy);
  audit.q = {buffers_->q() + begin * DTypeBytes(batch.in_type),
             static_cast<size_t>(elements * DTypeBytes(batch.in_type))};
  audit.out = {buffers_->out() + begin * DTypeBytes(batch.out_type),
               static_cast<size_t>(elements * DTypeBytes(batch.out_type))};
  audit.heads = {HeadsOf(step), static_cast<size_t>(shape_.num_kv_heads)};
  auditor_->Keep(audit);
}

}  // namespace adaattn

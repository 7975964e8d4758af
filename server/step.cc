#include "server/step.h"

#include "absl/strings/str_cat.h"
#include "server/decision_summary.h"

namespace adaattn {
namespace {

std::string Field(const Step& step, const char* field) {
  return absl::StrCat("sequences[", step.sequence_idx, "].", field);
}

absl::Status CheckSession(uint64_t batch_serial, const Step& step) {
  const SequenceTask& sequence = step.sequence();
  if (!sequence.status.ok()) return sequence.status;
  if (sequence.session->closed()) {
    return absl::NotFoundError(
        absl::StrCat(Field(step, "session_id"), ": ", sequence.session->id(), " is closed"));
  }
  if (step.state().batch_serial == batch_serial) {
    return absl::InvalidArgumentError(absl::StrCat(Field(step, "session_id"), ": ",
                                                   sequence.session->id(),
                                                   " is in this message more than once"));
  }
  return absl::OkStatus();
}

absl::Status ResolvePosition(Step* step) {
  const SequenceTask& sequence = step->sequence();
  const SessionConfig& config = step->session()->config();
  const LayerState& state = step->state();
  const int64_t position = sequence.position - config.start_position;
  const int64_t end = position + sequence.append_len;
  step->append_len = sequence.append_len;
  step->q_start =
      sequence.q_position ? *sequence.q_position - config.start_position : end - sequence.q_len;
  if (position == state.length) {
    if (end <= config.max_tokens) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(Field(*step, "append_len"), ": ", sequence.append_len, " tokens at length ",
                     state.length, " exceed the session's max_tokens of ", config.max_tokens));
  }
  const bool same_step = step->task->is_import || (sequence.step_id == state.last_step_id &&
                                                   sequence.append_len == state.last_append_len);
  if (sequence.append_len > 0 && position >= 0 && end == state.length && same_step) {
    step->replayed = true;
    step->append_len = 0;
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(absl::StrCat(
      Field(*step, "position"), ": ", sequence.position, " with append_len ", sequence.append_len,
      " and step_id ", sequence.step_id, " does not follow; layer ", step->layer, " has length ",
      config.start_position + state.length, " (start_position included)"));
}

absl::Status ResolveHow(double queue_fraction, double pressure_threshold, Step* step) {
  const SessionConfig& config = step->session()->config();
  const AttendOptions& message = step->task->options;
  absl::StatusOr<ResolvedOptions> options =
      ResolveOptions(message, config.default_options, config.format, config.keeps_exact_pages(),
                     config.shape.head_dim);
  if (!options.ok()) return options.status();
  step->options = *options;
  DecisionParams& decision = step->options.decision;
  const float target = RaiseTarget(decision.target_relative_error, options->max_relative_error,
                                   queue_fraction, pressure_threshold);
  step->target_raised = AimsAtError(decision.policy) && options->mode == AttendMode::kStatistical &&
                        target > decision.target_relative_error;
  if (step->target_raised) decision.target_relative_error = target;
  step->exact_table = IsProgressive(config.format) && options->mode == AttendMode::kExact;
  const LayerOptions layer = config.layer(step->layer);
  step->window = message.window.value_or(layer.window);
  step->softcap = message.softcap.value_or(layer.softcap);
  return absl::OkStatus();
}

}  // namespace

void ResolveStep(uint64_t batch_serial, double queue_fraction, double pressure_threshold,
                 Step* step) {
  step->status = CheckSession(batch_serial, *step);
  if (step->status.ok()) step->status = ResolvePosition(step);
  // An append without q attends nothing: its mode does not matter.
  if (step->status.ok() && step->q_len() > 0) {
    step->status = ResolveHow(queue_fraction, pressure_threshold, step);
  }
  if (step->status.ok()) step->state().batch_serial = batch_serial;
}

}  // namespace adaattn

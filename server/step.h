#ifndef ADAATTN_SERVER_STEP_H_
#define ADAATTN_SERVER_STEP_H_

#include <cstdint>

#include "absl/status/status.h"
#include "server/attention_task.h"
#include "server/kv_cache.h"

namespace adaattn {

// One (sequence, layer) of a batch on its way through the engine.
struct Step {
  // Where it comes from.
  AttentionTask* task = nullptr;
  int32_t sequence_idx = 0;  // in the task
  int32_t layer = 0;
  int64_t task_q_row = 0;   // its first row in the task's q
  int64_t task_kv_row = 0;  // its first row in the task's k and v

  // What is to be done, once resolved. Positions are the cache's.
  absl::Status status;
  bool replayed = false;
  int32_t append_len = 0;  // 0 for a replay
  int64_t q_start = 0;
  int64_t window = 0;
  float softcap = 0;
  ResolvedOptions options;
  bool target_raised = false;
  bool exact_table = false;  // attends the exact tier's pages
  AppendReservation reservation;

  // Where it stands in its run.
  bool has_run = false;
  int64_t run_q_row = 0;
  int64_t run_kv_row = 0;

  const SequenceTask& sequence() const { return task->sequences[sequence_idx]; }
  Session* session() const { return sequence().session.get(); }
  LayerState& state() const { return session()->layers()[layer]; }
  int32_t q_len() const { return sequence().q_len; }
};

// Decides what `step` does by the state of its layer, or sets its status:
//   append once    position = length: appended. position + append_len = length with the last step's
//                  id (an import: whatever the id): replayed, nothing is appended. Anything else:
//                  kFailedPrecondition naming the length
//   max_tokens     kInvalidArgument
//   options        see ResolveOptions; the target is raised with the queue's fill
//   twice          kInvalidArgument when the layer has `batch_serial` already
void ResolveStep(uint64_t batch_serial, double queue_fraction, double pressure_threshold,
                 Step* step);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_STEP_H_

#ifndef ADAATTN_SERVER_BATCH_RUNNER_H_
#define ADAATTN_SERVER_BATCH_RUNNER_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "kernels/attention.h"
#include "server/auditor.h"
#include "server/batcher.h"
#include "server/clock.h"
#include "server/engine_observer.h"
#include "server/kv_cache.h"
#include "server/sealer.h"
#include "server/step.h"

namespace adaattn {

struct BatchRunnerOptions {
  BatcherOptions limits;                         // of one batch
  int64_t max_table_entries = int64_t{1} << 20;  // pages that one backend run may refer to
  double pressure_threshold = 0.5;               // see EngineOptions
};

// Takes one batch from tasks to answers: resolve, reserve, copy in, run, commit, copy out, reply.
// One bad sequence leaves the others unharmed. Threads: the engine's only.
class BatchRunner {
 public:
  // All outlive the runner.
  BatchRunner(const BatchRunnerOptions& options, KvCache* cache, Sealer* sealer, Auditor* auditor,
              EngineObserver* observer, const Clock* clock);

  // Creates the step buffers; once, before the first Run.
  absl::Status CreateBuffers();

  // Every task of the batch is finished when it returns. Errors: kUnavailable, the device is lost;
  // the tasks have been told.
  absl::Status Run(Batch* batch, const BatcherLoad& load);

 private:
  void Expand(Batch* batch);
  static void MakeReplyBuffer(AttentionTask* task);
  void Reserve(Step* step);
  // Makes a run of the steps that can run together; empty when none is left.
  void CollectRun();
  void RunCollected();
  void NoticeStep();
  absl::Status Execute(AttendBatch* batch);
  void CopyIn();
  void SampleQueries(const Step& step);
  void FillSequences();
  void TakeResults(const AttendBatch& batch);
  // Names the first of the step's values that the backend refused.
  absl::Status RefuseValue(const Step& step, const AttendBatch& batch,
                           const SequenceResult& result) const;
  void Commit(Step* step);
  HeadDecision* HeadsOf(const Step& step);
  void CopyOut(const Step& step, const AttendBatch& batch);
  void KeepForAudit(const Step& step, const AttendBatch& batch);
  void SettleOutcome(Step* step);
  void Report(const Batch& batch, const BatcherLoad& load);
  void Reply(Batch* batch);

  const BatchRunnerOptions options_;
  Backend* const backend_;
  KvCache* const cache_;
  Sealer* const sealer_;
  Auditor* const auditor_;
  EngineObserver* const observer_;
  const Clock* const clock_;
  std::unique_ptr<StepBuffers> buffers_;

  // Of the batch at hand; kept for their memory.
  uint64_t serial_ = 0;
  double queue_fraction_ = 0;
  absl::Status device_;
  absl::Time started_;
  TaskTimes times_;
  AttentionShape shape_;
  std::vector<Step> steps_;
  std::vector<HeadDecision> heads_;  // [steps, num_kv_heads]
  std::vector<Step*> run_;
  std::vector<SequenceStep> sequences_;
  std::vector<PageId> tables_;
  std::vector<float> thetas_;  // [sequences, num_kv_heads]
  std::vector<absl::Duration> queue_times_;
  std::vector<StepReport> reports_;
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_BATCH_RUNNER_H_

#ifndef ADAATTN_SERVER_BATCHER_H_
#define ADAATTN_SERVER_BATCHER_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "kernels/mutex.h"
#include "server/attention_task.h"
#include "server/clock.h"

namespace adaattn {

struct BatcherOptions {
  // The queue. All must be > 0.
  int64_t max_queued_tasks = 4096;
  int64_t max_queued_tokens = int64_t{1} << 20;  // q rows + appended rows
  int64_t max_queued_bytes = int64_t{1} << 30;   // of payload
  // One batch; a task above these never fits.
  int32_t max_batch_sequences = 1024;  // (sequence, layer) pairs
  int64_t max_batch_tokens = 65536;
  int64_t max_batch_decisions = 65536;             // (sequence, layer, kv head) triples
  int64_t max_batch_q_bytes = int64_t{32} << 20;   // of q, and of o, in the backend's types
  int64_t max_batch_kv_bytes = int64_t{32} << 20;  // of k, and of v, likewise
  // How long a batch that has fewer sequences than the one before waits for the rest: closed-loop
  // clients answered together come back together. 0 = never. A single stream never waits.
  absl::Duration max_delay = absl::Microseconds(100);
  // Before blocking, Next() looks for work this long: a wake costs more than a small step.
  absl::Duration spin = absl::Microseconds(20);
};

// Tasks that run together: one shape, session format, element types and exactness; no
// (session, layer) twice. A batch only ever closes.
struct Batch {
  std::vector<std::unique_ptr<AttentionTask>> tasks;
  int64_t tokens = 0;
  int32_t num_sequences = 0;  // (sequence, layer) pairs
  int64_t q_bytes = 0;        // of q, and of o
  int64_t kv_bytes = 0;       // of k, and of v
};

struct BatcherLoad {
  int64_t tasks = 0;
  int64_t tokens = 0;
  int64_t bytes = 0;
  double fraction = 0;  // the fullest of the three limits
};

// The queue between the RPC reactions and the engine. Tasks leave in the order of arrival, except
// that a batch takes later tasks that go with its first one; tasks of one (session, layer) never
// overtake each other.
// Threads: Schedule, Post, Shutdown and load() from any; Next from the engine's.
class Batcher {
 public:
  Batcher(const BatcherOptions& options, const Clock* clock);
  Batcher(const Batcher&) = delete;
  Batcher& operator=(const Batcher&) = delete;

  // Takes *task on OK and only then; never blocks. Errors:
  //   kResourceExhausted  the queue is full: try again after retry_after()
  //   kInvalidArgument    larger than any batch: never fits
  //   kDeadlineExceeded   its deadline is past
  //   kUnavailable        shutting down
  absl::Status Schedule(std::unique_ptr<AttentionTask>* task);
  // A guess from the time that recent batches took.
  absl::Duration retry_after() const;

  // Runs `work` on the engine thread, between batches, in the order posted. False after the engine
  // has stopped taking work: then it will never run.
  bool Post(std::function<void()> work);

  struct Work {
    std::vector<std::function<void()>> posted;  // run these first
    std::unique_ptr<Batch> batch;               // null = none is due
    bool finished = false;                      // shut down, and everything has been handed out
  };
  // Returns as soon as there is something to do, or after `timeout`.
  Work Next(absl::Duration timeout);
  // The same without waiting: what is due now by the clock. Tests step through time with it.
  Work Poll();

  // No new tasks from here on; Next hands out what is queued, then says finished.
  void Shutdown();
  // Takes every queued task out (device lost, drain deadline).
  std::vector<std::unique_ptr<AttentionTask>> TakeAll();

  // Of the engine: how long the last batch took, for retry_after().
  void RecordBatchTime(absl::Duration duration);

  BatcherLoad load() const;

 private:
  absl::Status CheckFits(const AttentionTask& task) const;
  absl::Status CheckRoomLocked(const AttentionTask& task) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool Add(std::unique_ptr<AttentionTask>* task, Batch* batch) const;
  absl::Duration HoldLeftLocked(absl::Time now) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::unique_ptr<Batch> FormBatchLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // What is due, and if nothing is, how long until a held batch will be.
  Work PollLocked(absl::Time now, absl::Duration* hold) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void AccountLocked(const AttentionTask& task, int sign) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const BatcherOptions options_;
  const Clock* const clock_;
  std::atomic<int64_t> num_pending_{0};  // tasks and posted work, for the spin
  std::atomic<int64_t> batch_ns_{0};     // running mean
  mutable Mutex mutex_;
  CondVar work_arrived_;
  std::deque<std::unique_ptr<AttentionTask>> queue_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::function<void()>> posted_ ABSL_GUARDED_BY(mutex_);
  int64_t queued_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t queued_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  int32_t queued_sequences_ ABSL_GUARDED_BY(mutex_) = 0;
  int32_t last_batch_sequences_ ABSL_GUARDED_BY(mutex_) = 0;
  bool waiting_ ABSL_GUARDED_BY(mutex_) = false;
  bool shut_down_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_BATCHER_H_

#ifndef ADAATTN_SERVER_ENGINE_H_
#define ADAATTN_SERVER_ENGINE_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "kernels/attention.h"
#include "server/auditor.h"
#include "server/batch_runner.h"
#include "server/batcher.h"
#include "server/clock.h"
#include "server/engine_observer.h"
#include "server/kv_cache.h"
#include "server/sealer.h"
#include "server/session_control.h"
#include "server/session_table.h"

namespace adaattn {

struct EngineOptions {
  BatcherOptions batcher;
  // pool_bytes 0 = the backend's; a tenant's limit of 0 = all of pool or tier; the tier itself is
  // the backend's.
  PageAllocatorOptions pages;
  SealOptions seal;
  // Share of statistical (sequence, layer) steps that are recomputed after their reply, in [0, 1].
  double audit_share = 0.001;
  // Above this fill of the queue, budgets grow from their target toward their max, which they reach
  // when the queue is full; in (0, 1]. 1 = never.
  double pressure_threshold = 0.5;
  absl::Duration tick = absl::Seconds(1);  // expiry sweep and gauges; > 0
};

// Owns the one thread that uses a backend: takes batches, runs them, answers, and seals pages and
// audits in between. Everything about sessions' pages happens on that thread.
//
//   Engine engine(options, backend, &table, observer, clock);
//   engine.Start(on_device_lost);
//   engine.Schedule(&task);                    // any thread; task->done runs on the engine thread
//   engine.Post([&] { engine.control()->Truncate(...); });
//   engine.Stop(absl::Now() + absl::Seconds(5));
class Engine {
 public:
  // `backend`, `table`, `observer` (null = none) and `clock` outlive the engine.
  Engine(const EngineOptions& options, Backend* backend, SessionTable* table,
         EngineObserver* observer, const Clock* clock);
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine();  // stops at once when still running

  // Creates the step buffers and starts the thread. `on_device_lost` is called once, on the engine
  // thread, after every queued task was failed with kUnavailable: leave with a non-zero status.
  absl::Status Start(std::function<void(const absl::Status&)> on_device_lost);

  // See Batcher::Schedule.
  absl::Status Schedule(std::unique_ptr<AttentionTask>* task);
  absl::Duration retry_after() const { return batcher_.retry_after(); }
  // See Batcher::Post.
  bool Post(std::function<void()> work) { return batcher_.Post(std::move(work)); }

  // Refuses new tasks, runs what is queued until `deadline` (then fails it with kUnavailable),
  // frees every session's pages and joins the thread. Idempotent.
  void Stop(absl::Time deadline);

  // Runs all sealing that is due; returns when it is done. Any thread but the engine's.
  void Quiesce();

  // Has the session sealed however short it is, and calls `done` on the engine thread: with OK once
  // no page of the session is due for sealing (or it is closed), with kCancelled, within a tick,
  // once `cancelled` is set, with the reason when the device is lost or the engine stops. A full
  // pool can keep pages due. Use only inside Post.
  void WhenSealed(std::shared_ptr<Session> session, CancelFlag cancelled,
                  std::function<void(const absl::Status&)> done);

  BatcherLoad load() const { return batcher_.load(); }
  PageStats page_stats() const { return allocator_.stats(); }
  const BackendInfo& backend_info() const { return backend_->info(); }
  // Use only inside Post.
  SessionControl* control() { return &control_; }

 private:
  void Run();
  void RunBatch(Batch* batch);
  // True when sealing made progress: more may be due.
  bool BetweenBatches(bool idle);
  bool SealSlice();
  void Tick();
  void ReportGauges();
  void LoseDevice(const absl::Status& status);
  void FailAll(const absl::Status& status);
  // Answers who waits for sealing: all with `status` if that is not OK.
  void AnswerSealWaiters(const absl::Status& status);

  struct SealWaiter {
    std::shared_ptr<Session> session;
    CancelFlag cancelled;
    std::function<void(const absl::Status&)> done;
  };

  const EngineOptions options_;
  Backend* const backend_;
  SessionTable* const table_;
  EngineObserver* const observer_;
  const Clock* const clock_;
  Batcher batcher_;
  PageAllocator allocator_;
  KvCache cache_;
  SessionControl control_;
  Sealer sealer_;
  Auditor auditor_;
  BatchRunner runner_;
  std::function<void(const absl::Status&)> on_device_lost_;
  std::atomic<int64_t> stop_deadline_ns_;
  absl::Time next_tick_;
  std::vector<SealWaiter> seal_waiters_;  // engine thread only
  absl::Status device_or_drain_;          // why every batch is refused; engine thread only
  bool stopped_ = false;                  // of the thread that calls Stop
  std::thread thread_;
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_ENGINE_H_

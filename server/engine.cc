#include "server/engine.h"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace adaattn {
namespace {

PageAllocatorOptions WithPool(PageAllocatorOptions options, const BackendInfo& info) {
  if (options.pool_bytes == 0) options.pool_bytes = info.pool_bytes;
  if (options.max_tenant_bytes == 0) options.max_tenant_bytes = options.pool_bytes;
  options.exact_tier_begin = info.pool_bytes;
  options.exact_tier_bytes = info.exact_tier_bytes;
  if (options.max_tenant_exact_bytes == 0) {
    options.max_tenant_exact_bytes = options.exact_tier_bytes;
  }
  return options;
}

EngineObserver* OrSilent(EngineObserver* observer) {
  static EngineObserver* const silent = new EngineObserver;
  return observer == nullptr ? silent : observer;
}

BatchRunnerOptions RunnerOptions(const EngineOptions& options) {
  BatchRunnerOptions runner;
  runner.limits = options.batcher;
  runner.pressure_threshold = options.pressure_threshold;
  return runner;
}

}  // namespace

const char* SessionEventName(SessionEvent event) {
  switch (event) {
    case SessionEvent::kOpened:
      return "opened";
    case SessionEvent::kClosed:
      return "closed";
    case SessionEvent::kExpired:
      return "expired";
    case SessionEvent::kForked:
      return "forked";
    case SessionEvent::kTruncated:
      return "truncated";
    case SessionEvent::kReopened:
      return "reopened";
  }
  return "unknown";
}

Engine::Engine(const EngineOptions& options, Backend* backend, SessionTable* table,
               EngineObserver* observer, const Clock* clock)
    : options_(options),
      backend_(backend),
      table_(table),
      observer_(OrSilent(observer)),
      clock_(clock),
      batcher_(options.batcher, clock),
      allocator_(WithPool(options.pages, backend->info())),
      cache_(backend, &allocator_),
      control_(table, &cache_),
      sealer_(options.seal, &cache_, table),
      auditor_(options.audit_share, backend, observer_),
      runner_(RunnerOptions(options), &cache_, &sealer_, &auditor_, observer_, clock),
      stop_deadline_ns_(absl::ToUnixNanos(absl::InfiniteFuture())) {}

Engine::~Engine() { Stop(absl::InfinitePast()); }

absl::Status Engine::Start(std::function<void(const absl::Status&)> on_device_lost) {
  absl::Status status = runner_.CreateBuffers();
  if (!status.ok()) return status;
  on_device_lost_ = std::move(on_device_lost);
  next_tick_ = clock_->Now() + options_.tick;
  thread_ = std::thread([this] { Run(); });
  return absl::OkStatus();
}

absl::Status Engine::Schedule(std::unique_ptr<AttentionTask>* task) {
  return batcher_.Schedule(task);
}

void Engine::Stop(absl::Time deadline) {
  if (stopped_) return;
  stopped_ = true;
  stop_deadline_ns_.store(absl::ToUnixNanos(deadline), std::memory_order_release);
  batcher_.Shutdown();
  if (thread_.joinable()) {
    thread_.join();
  } else {
    FailAll(absl::UnavailableError("the engine was never started"));
  }
  control_.CloseAll();
}

void Engine::Quiesce() {
  Mutex mutex;
  CondVar done;
  bool quiet = false;
  const bool posted = Post([&] {
    while (SealSlice()) {
    }
    MutexLock lock(&mutex);
    quiet = true;
    done.Signal();
  });
  MutexLock lock(&mutex);
  while (posted && !quiet) done.Wait(&mutex);
}

void Engine::Run() {
  bool sealing = false;  // the last slice of sealing made progress: look for another
  while (true) {
    const absl::Duration timeout =
        sealing ? absl::ZeroDuration()
                : std::clamp(next_tick_ - clock_->Now(), absl::ZeroDuration(), options_.tick);
    Batcher::Work work = batcher_.Next(timeout);
    for (const auto& posted : work.posted) posted();
    if (work.finished) {
      return AnswerSealWaiters(absl::UnavailableError("draining: pages are still to be sealed"));
    }
    const bool idle = work.batch == nullptr;
    if (!idle) RunBatch(work.batch.get());
    sealing = BetweenBatches(idle);
  }
}

void Engine::RunBatch(Batch* batch) {
  const absl::Time start = clock_->Now();
  const auto deadline = absl::FromUnixNanos(stop_deadline_ns_.load(std::memory_order_acquire));
  if (start >= deadline) device_or_drain_ = absl::UnavailableError("draining: no time is left");
  if (!device_or_drain_.ok()) {
    for (auto& task : batch->tasks) {
      FailTask(std::move(task), device_or_drain_, absl::ZeroDuration());
    }
    return;
  }
  const absl::Status status = runner_.Run(batch, batcher_.load());
  batcher_.RecordBatchTime(clock_->Now() - start);
  if (!status.ok()) LoseDevice(status);
}

void Engine::LoseDevice(const absl::Status& status) {
  if (!device_or_drain_.ok()) return;
  device_or_drain_ = status;
  FailAll(status);
  if (on_device_lost_) on_device_lost_(status);
}

bool Engine::BetweenBatches(bool idle) {
  // After a batch: seal at once unless another one is waiting. A steady stream never leaves a whole
  // tick of idleness, so waiting for one would let its pages pile up to the limit.
  bool progress = !idle && !sealer_.idle();
  if (idle || sealer_.over_limit() || !seal_waiters_.empty()) progress = SealSlice();
  if (clock_->Now() >= next_tick_) Tick();
  if (!idle) ReportGauges();
  AnswerSealWaiters(device_or_drain_);
  return progress;
}

void Engine::WhenSealed(std::shared_ptr<Session> session, CancelFlag cancelled,
                        std::function<void(const absl::Status&)> done) {
  sealer_.Ask(session);
  seal_waiters_.push_back({std::move(session), std::move(cancelled), std::move(done)});
}

void Engine::AnswerSealWaiters(const absl::Status& status) {
  for (size_t i = 0; i < seal_waiters_.size();) {
    absl::Status outcome = status;
    if (IsCancelled(seal_waiters_[i].cancelled)) outcome = absl::CancelledError("the caller left");
    if (outcome.ok() && sealer_.Owes(*seal_waiters_[i].session)) {
      ++i;
      continue;
    }
    const auto done = std::move(seal_waiters_[i].done);
    seal_waiters_.erase(seal_waiters_.begin() + static_cast<std::ptrdiff_t>(i));
    done(outcome);
  }
}

bool Engine::SealSlice() {
  if (sealer_.idle() || !device_or_drain_.ok()) return false;
  const absl::Time start = clock_->Now();
  absl::StatusOr<SealReport> report = sealer_.RunSlice();
  if (!report.ok()) {
    if (absl::IsUnavailable(report.status())) LoseDevice(report.status());
    return false;
  }
  report->duration = clock_->Now() - start;
  observer_->OnSeal(*report);
  return report->pages_sealed > 0 || report->bases_fitted > 0;
}

void Engine::Tick() {
  next_tick_ = clock_->Now() + options_.tick;
  const int64_t expired = control_.CloseExpired();
  if (expired > 0) observer_->OnSessionEvent(SessionEvent::kExpired, expired);
  ReportGauges();
}

void Engine::ReportGauges() {
  GaugeReport gauges;
  gauges.sessions = table_->size();
  gauges.pages = allocator_.stats();
  gauges.load = batcher_.load();
  gauges.seal_backlog = sealer_.backlog_pages();
  observer_->OnGauges(gauges);
}

void Engine::FailAll(const absl::Status& status) {
  for (auto& task : batcher_.TakeAll()) {
    FailTask(std::move(task), status, absl::ZeroDuration());
  }
}

}  // namespace adaattn

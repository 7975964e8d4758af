#include "server/batcher.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <thread>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"

namespace adaattn {
namespace {

// Tasks that a batch in the making passes over before it looks no further for company: bounds the
// work under the lock when few sessions have many steps queued.
constexpr int32_t kMaxPassedOver = 256;

struct TaskSize {
  int64_t sequences = 0;  // (sequence, layer) pairs
  int64_t decisions = 0;
  int64_t q_bytes = 0;
  int64_t kv_bytes = 0;
};

TaskSize SizeOf(const AttentionTask& task) {
  TaskSize size;
  size.sequences = static_cast<int64_t>(task.sequences.size()) * task.num_layers;
  size.decisions = size.sequences * task.shape.num_kv_heads;
  const int32_t in = DTypeBytes(task.in_type());
  const int64_t head_dim = task.shape.head_dim;
  size.q_bytes =
      task.q_rows() * task.shape.num_q_heads * head_dim * std::max(in, DTypeBytes(task.out_type));
  size.kv_bytes = task.appended_rows() * task.shape.num_kv_heads * head_dim * in;
  return size;
}

bool GoTogether(const AttentionTask& a, const AttentionTask& b) {
  return a.shape == b.shape && a.format == b.format && a.exact == b.exact &&
         a.in_type() == b.in_type() && a.out_type == b.out_type;
}

// The (session, layer) pairs of the tasks that a batch in the making has looked at.
class LayerSet {
 public:
  bool Overlaps(const AttentionTask& task) const {
    return !seen_.empty() && Any(task, [this](const auto& key) { return seen_.contains(key); });
  }
  void Add(const AttentionTask& task) {
    Any(task, [this](const auto& key) {
      seen_.insert(key);
      return false;
    });
  }

 private:
  using Key = std::pair<const Session*, int32_t>;

  template <typename Function>
  static bool Any(const AttentionTask& task, Function function) {
    for (const SequenceTask& sequence : task.sequences) {
      for (int32_t i = 0; sequence.session != nullptr && i < task.num_layers; ++i) {
        if (function(Key(sequence.session.get(), task.layer + i))) return true;
      }
    }
    return false;
  }

  absl::flat_hash_set<Key> seen_;
};

}  // namespace

Batcher::Batcher(const BatcherOptions& options, const Clock* clock)
    : options_(options), clock_(clock) {}

absl::Status Batcher::CheckFits(const AttentionTask& task) const {
  const TaskSize size = SizeOf(task);
  const auto never_fits = [](const char* field, int64_t value, int64_t limit) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, ": ", value, " in one message, at most ", limit, "; split it"));
  };
  if (size.sequences > options_.max_batch_sequences) {
    return never_fits("sequences", size.sequences, options_.max_batch_sequences);
  }
  if (size.decisions > options_.max_batch_decisions) {
    return never_fits("sequences * num_kv_heads", size.decisions, options_.max_batch_decisions);
  }
  const int64_t tokens = std::min(options_.max_batch_tokens, options_.max_queued_tokens);
  if (task.tokens > tokens) return never_fits("q_len and append_len, summed", task.tokens, tokens);
  if (size.q_bytes > options_.max_batch_q_bytes) {
    return never_fits("bytes of q or of o", size.q_bytes, options_.max_batch_q_bytes);
  }
  if (size.kv_bytes > options_.max_batch_kv_bytes) {
    return never_fits("bytes of k", size.kv_bytes, options_.max_batch_kv_bytes);
  }
  if (task.bytes > options_.max_queued_bytes) {
    return never_fits("bytes of q, k and v", task.bytes, options_.max_queued_bytes);
  }
  return absl::OkStatus();
}

absl::Status Batcher::CheckRoomLocked(const AttentionTask& task) const {
  const auto full = [](const char* what, int64_t limit) {
    return absl::ResourceExhaustedError(
        absl::StrCat("queue full: it holds its limit of ", limit, " ", what, "; ask again later"));
  };
  if (static_cast<int64_t>(queue_.size()) >= options_.max_queued_tasks) {
    return full("messages", options_.max_queued_tasks);
  }
  if (queued_tokens_ + task.tokens > options_.max_queued_tokens) {
    return full("tokens", options_.max_queued_tokens);
  }
  if (queued_bytes_ + task.bytes > options_.max_queued_bytes) {
    return full("bytes", options_.max_queued_bytes);
  }
  return absl::OkStatus();
}

absl::Status Batcher::Schedule(std::unique_ptr<AttentionTask>* task) {
  AttentionTask& fresh = **task;
  fresh.tokens = fresh.q_rows() + fresh.appended_rows();
  fresh.bytes = fresh.q.bytes() + fresh.k.bytes() + fresh.v.bytes();
  absl::Status status = CheckFits(fresh);
  if (!status.ok()) return status;
  fresh.enqueued = clock_->Now();
  if (fresh.deadline <= fresh.enqueued) {
    return absl::DeadlineExceededError("the deadline was past on arrival; nothing was done");
  }
  bool wake = false;
  {
    MutexLock lock(&mutex_);
    if (shut_down_) return absl::UnavailableError("draining: this server takes no new work");
    status = CheckRoomLocked(fresh);
    if (!status.ok()) return status;
    for (const SequenceTask& sequence : fresh.sequences) {
      if (sequence.session != nullptr) sequence.session->TaskBegins();
    }
    AccountLocked(fresh, 1);
    queue_.push_back(std::move(*task));
    wake = waiting_;
  }
  if (wake) work_arrived_.Signal();
  return absl::OkStatus();
}

void Batcher::AccountLocked(const AttentionTask& task, int sign) {
  queued_tokens_ += sign * task.tokens;
  queued_bytes_ += sign * task.bytes;
  queued_sequences_ += sign * static_cast<int32_t>(task.sequences.size()) * task.num_layers;
  num_pending_.fetch_add(sign, std::memory_order_release);
}

absl::Duration Batcher::retry_after() const {
  const absl::Duration batch = absl::Nanoseconds(batch_ns_.load(std::memory_order_relaxed));
  return std::clamp(2 * batch, absl::Milliseconds(1), absl::Seconds(1));
}

void Batcher::RecordBatchTime(absl::Duration duration) {
  const int64_t mean = batch_ns_.load(std::memory_order_relaxed);
  batch_ns_.store(mean + (absl::ToInt64Nanoseconds(duration) - mean) / 8,
                  std::memory_order_relaxed);
}

bool Batcher::Post(std::function<void()> work) {
  bool wake = false;
  {
    MutexLock lock(&mutex_);
    if (finished_) return false;
    posted_.push_back(std::move(work));
    num_pending_.fetch_add(1, std::memory_order_release);
    wake = waiting_;
  }
  if (wake) work_arrived_.Signal();
  return true;
}

absl::Duration Batcher::HoldLeftLocked(absl::Time now) const {
  if (shut_down_ || options_.max_delay <= absl::ZeroDuration() ||
      queued_sequences_ >= last_batch_sequences_ || queued_tokens_ >= options_.max_batch_tokens ||
      queued_bytes_ >= options_.max_batch_kv_bytes) {
    return absl::ZeroDuration();
  }
  absl::Time due = queue_.front()->enqueued + options_.max_delay;
  // A task must still have the time of a batch when the hold ends.
  const absl::Duration batch = absl::Nanoseconds(batch_ns_.load(std::memory_order_relaxed));
  for (const auto& task : queue_) due = std::min(due, task->deadline - 2 * batch);
  return std::max(due - now, absl::ZeroDuration());
}

bool Batcher::Add(std::unique_ptr<AttentionTask>* task, Batch* batch) const {
  const TaskSize size = SizeOf(**task);
  const int64_t sequences = batch->num_sequences + size.sequences;
  if (sequences > options_.max_batch_sequences ||
      sequences * (*task)->shape.num_kv_heads > options_.max_batch_decisions ||
      batch->tokens + (*task)->tokens > options_.max_batch_tokens ||
      batch->q_bytes + size.q_bytes > options_.max_batch_q_bytes ||
      batch->kv_bytes + size.kv_bytes > options_.max_batch_kv_bytes) {
    return false;
  }
  batch->num_sequences = static_cast<int32_t>(sequences);
  batch->tokens += (*task)->tokens;
  batch->q_bytes += size.q_bytes;
  batch->kv_bytes += size.kv_bytes;
  batch->tasks.push_back(std::move(*task));
  return true;
}

std::unique_ptr<Batch> Batcher::FormBatchLocked() {
  auto batch = std::make_unique<Batch>();
  LayerSet seen;
  int32_t passed_over = 0;
  size_t end = 0;
  for (; end < queue_.size() && passed_over < kMaxPassedOver; ++end) {
    std::unique_ptr<AttentionTask>& task = queue_[end];
    const AttentionTask& candidate = *task;
    const bool fits =
        end == 0 || (GoTogether(*batch->tasks[0], candidate) && !seen.Overlaps(candidate));
    // What is passed over must not be overtaken by its own later steps.
    if (queue_.size() > 1) seen.Add(candidate);
    if (!fits) {
      ++passed_over;
      continue;
    }
    if (!Add(&task, batch.get())) break;
    AccountLocked(*batch->tasks.back(), -1);
  }
  const auto looked_at = queue_.begin() + static_cast<std::ptrdiff_t>(end);
  queue_.erase(std::remove(queue_.begin(), looked_at, nullptr), looked_at);
  last_batch_sequences_ = batch->num_sequences;
  return batch;
}

Batcher::Work Batcher::PollLocked(absl::Time now, absl::Duration* hold) {
  Work work;
  *hold = absl::InfiniteDuration();
  if (!posted_.empty()) {
    work.posted.swap(posted_);
    num_pending_.fetch_sub(static_cast<int64_t>(work.posted.size()), std::memory_order_release);
  }
  if (!queue_.empty()) {
    *hold = HoldLeftLocked(now);
    if (*hold == absl::ZeroDuration()) work.batch = FormBatchLocked();
  }
  if (shut_down_ && queue_.empty() && work.batch == nullptr && work.posted.empty()) {
    finished_ = true;
    work.finished = true;
  }
  return work;
}

Batcher::Work Batcher::Poll() {
  const absl::Time now = clock_->Now();
  absl::Duration hold;
  MutexLock lock(&mutex_);
  return PollLocked(now, &hold);
}

Batcher::Work Batcher::Next(absl::Duration timeout) {
  using SteadyClock = std::chrono::steady_clock;
  const auto start = SteadyClock::now();
  const auto waited = [start] { return absl::FromChrono(SteadyClock::now() - start); };
  const absl::Duration spin = std::min(timeout, options_.spin);
  while (num_pending_.load(std::memory_order_acquire) == 0 && waited() < spin) {
    std::this_thread::yield();
  }
  MutexLock lock(&mutex_);
  while (true) {
    absl::Duration hold;
    Work work = PollLocked(clock_->Now(), &hold);
    const absl::Duration left = std::min(hold, timeout - waited());
    if (!work.posted.empty() || work.batch != nullptr || work.finished ||
        left <= absl::ZeroDuration()) {
      return work;
    }
    waiting_ = true;
    work_arrived_.WaitFor(&mutex_, left);
    waiting_ = false;
  }
}

void Batcher::Shutdown() {
  {
    MutexLock lock(&mutex_);
    shut_down_ = true;
  }
  work_arrived_.Signal();
}

std::vector<std::unique_ptr<AttentionTask>> Batcher::TakeAll() {
  std::vector<std::unique_ptr<AttentionTask>> tasks;
  MutexLock lock(&mutex_);
  for (auto& task : queue_) {
    AccountLocked(*task, -1);
    tasks.push_back(std::move(task));
  }
  queue_.clear();
  return tasks;
}

BatcherLoad Batcher::load() const {
  BatcherLoad load;
  MutexLock lock(&mutex_);
  load.tasks = static_cast<int64_t>(queue_.size());
  load.tokens = queued_tokens_;
  load.bytes = queued_bytes_;
  const auto share = [](int64_t used, int64_t limit) {
    return static_cast<double>(used) / static_cast<double>(limit);
  };
  load.fraction = std::max({share(load.tasks, options_.max_queued_tasks),
                            share(load.tokens, options_.max_queued_tokens),
                            share(load.bytes, options_.max_queued_bytes)});
  return load;
}

}  // namespace adaattn

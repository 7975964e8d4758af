#include "kernels/cpu/worker_pool.h"

#include "absl/time/clock.h"
#include "hwy/cache_control.h"

namespace adaattn {
namespace {

// Longer than a step takes between two of its loops, too short to matter to anyone else.
constexpr absl::Duration kSpin = absl::Microseconds(30);

// Waits until `done` or for kSpin.
template <class Done>
void Spin(const Done& done) {
  constexpr int kLooksBetweenClocks = 64;
  const int64_t end = absl::GetCurrentTimeNanos() + absl::ToInt64Nanoseconds(kSpin);
  do {
    for (int i = 0; i < kLooksBetweenClocks; ++i) {
      if (done()) return;
      hwy::Pause();
    }
  } while (absl::GetCurrentTimeNanos() < end);
}

}  // namespace

WorkerPool::WorkerPool(int32_t num_threads) {
  threads_.reserve(num_threads > 1 ? num_threads - 1 : 0);
  for (int32_t worker = 1; worker < num_threads; ++worker) {
    threads_.emplace_back([this, worker] { Work(worker); });
  }
}

WorkerPool::~WorkerPool() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
  }
  start_.SignalAll();
  for (std::thread& thread : threads_) thread.join();
}

void WorkerPool::TakeItems(int32_t worker, const Run& run, int64_t num_items) {
  for (;;) {
    const int64_t item = next_item_.fetch_add(1, std::memory_order_relaxed);
    if (item >= num_items) return;
    run(item, worker);
  }
}

void WorkerPool::ParallelFor(int64_t num_items, bool alone, Run run) {
  if (alone || threads_.empty() || num_items < 2) {
    for (int64_t item = 0; item < num_items; ++item) run(item, 0);
    return;
  }
  {
    MutexLock lock(&mutex_);
    next_item_.store(0, std::memory_order_relaxed);
    run_ = &run;
    num_items_ = num_items;
    loop_.fetch_add(1, std::memory_order_relaxed);
  }
  start_.SignalAll();
  TakeItems(0, run, num_items);
  {
    // Who has not come by now finds nothing to do: no waiting for threads that still wake up.
    MutexLock lock(&mutex_);
    run_ = nullptr;
  }
  Spin([this] { return num_busy_.load(std::memory_order_relaxed) == 0; });
  MutexLock lock(&mutex_);
  while (num_busy_.load(std::memory_order_relaxed) > 0) done_.Wait(&mutex_);
}

void WorkerPool::Work(int32_t worker) {
  int64_t last_loop = 0;
  for (;;) {
    const Run* run = nullptr;
    int64_t num_items = 0;
    Spin([&] { return loop_.load(std::memory_order_relaxed) != last_loop; });
    {
      MutexLock lock(&mutex_);
      while (!stopping_ && loop_.load(std::memory_order_relaxed) == last_loop) {
        start_.Wait(&mutex_);
      }
      if (stopping_) return;
      last_loop = loop_.load(std::memory_order_relaxed);
      if (run_ == nullptr) continue;
      run = run_;
      num_items = num_items_;
      num_busy_.fetch_add(1, std::memory_order_relaxed);
    }
    TakeItems(worker, *run, num_items);
    MutexLock lock(&mutex_);
    if (num_busy_.fetch_sub(1, std::memory_order_relaxed) == 1) done_.Signal();
  }
}

}  // namespace adaattn

#include "kernels/cpu/worker_pool.h"

namespace adaattn {

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
    num_busy_ = static_cast<int32_t>(threads_.size());
    ++loop_;
  }
  start_.SignalAll();
  TakeItems(0, run, num_items);
  MutexLock lock(&mutex_);
  while (num_busy_ > 0) done_.Wait(&mutex_);
  run_ = nullptr;
}

void WorkerPool::Work(int32_t worker) {
  int64_t last_loop = 0;
  for (;;) {
    const Run* run = nullptr;
    int64_t num_items = 0;
    {
      MutexLock lock(&mutex_);
      while (!stopping_ && loop_ == last_loop) start_.Wait(&mutex_);
      if (stopping_) return;
      last_loop = loop_;
      run = run_;
      num_items = num_items_;
    }
    TakeItems(worker, *run, num_items);
    MutexLock lock(&mutex_);
    if (--num_busy_ == 0) done_.Signal();
  }
}

}  // namespace adaattn

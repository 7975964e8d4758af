#ifndef ADAATTN_KERNELS_CPU_WORKER_POOL_H_
#define ADAATTN_KERNELS_CPU_WORKER_POOL_H_

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"
#include "kernels/mutex.h"

namespace adaattn {

// A fixed set of threads that share the items of one loop at a time. The calling thread works too,
// so a pool of one thread starts none. Between loops that follow each other closely, as those of a
// step do, threads spin for a moment: sleeping and waking would take as long as a short loop.
// Threads: ParallelFor comes from one thread at a time.
class WorkerPool {
 public:
  // num_threads >= 1, the caller's included.
  explicit WorkerPool(int32_t num_threads);
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  int32_t num_threads() const { return static_cast<int32_t>(threads_.size()) + 1; }

  // Calls run(item, worker) once for every item in [0, num_items), worker in [0, num_threads), and
  // returns when all are done. Items start in ascending order. With `alone` the caller does all of
  // them: waking others costs some ten microseconds.
  void ParallelFor(int64_t num_items, bool alone,
                   absl::FunctionRef<void(int64_t item, int32_t worker)> run);

 private:
  using Run = absl::FunctionRef<void(int64_t, int32_t)>;

  void Work(int32_t worker);
  void TakeItems(int32_t worker, const Run& run, int64_t num_items);

  std::atomic<int64_t> next_item_{0};
  // Written under mutex_, and read without it by threads that spin.
  std::atomic<int64_t> loop_{0};
  std::atomic<int32_t> num_busy_{0};  // of the started threads

  Mutex mutex_;
  CondVar start_;
  CondVar done_;
  const Run* run_ ABSL_GUARDED_BY(mutex_) = nullptr;  // null: the loop takes nobody in any more
  int64_t num_items_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;

  std::vector<std::thread> threads_;
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_WORKER_POOL_H_

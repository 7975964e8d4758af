#ifndef ADAATTN_TESTS_UNIT_HOST_TEAM_H_
#define ADAATTN_TESTS_UNIT_HOST_TEAM_H_

// Threads of the host as a Team of kernels/cuda/bounded_pages.h.

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/cuda/bounded_head.h"

namespace adaattn {

class Barrier {
 public:
  explicit Barrier(int32_t threads) : threads_(threads) {}
  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t turn = turn_;
    if (++waiting_ == threads_) {
      waiting_ = 0;
      ++turn_;
      all_.notify_all();
      return;
    }
    all_.wait(lock, [&] { return turn_ != turn; });
  }

 private:
  const int32_t threads_;
  std::mutex mutex_;
  std::condition_variable all_;
  int32_t waiting_ = 0;
  int64_t turn_ = 0;
};

// One thread of a team on the host, a warp of one lane.
struct HostTeam {
  static constexpr int32_t kLanes = 1;
  int32_t cta = 0, num_ctas = 1, thread = 0, num_threads = 1, warp = 0, num_warps = 1, lane = 0;
  Barrier* in_cta = nullptr;
  Barrier* in_team = nullptr;
  std::mutex* adding = nullptr;

  void SyncCta() const { in_cta->Wait(); }
  void Sync() const { in_team->Wait(); }
  double Sum(double x) const { return x; }
  double Max(double x) const { return x; }
  template <typename T>
  void Add(T* counter, T x) const {
    const std::lock_guard<std::mutex> lock(*adding);
    *counter += x;
  }
};

// One kv head by two CTAs of three threads.
inline void RunHead(const BoundedParams& params, int32_t sequence, int32_t head) {
  constexpr int32_t kCtas = 2, kThreads = 3;
  Barrier team(kCtas * kThreads);
  std::mutex adding;
  std::vector<std::unique_ptr<Barrier>> barriers;
  std::vector<std::unique_ptr<std::byte[]>> memory;
  std::vector<std::thread> threads;
  for (int32_t cta = 0; cta < kCtas; ++cta) {
    barriers.push_back(std::make_unique<Barrier>(kThreads));
    memory.push_back(std::make_unique<std::byte[]>(BoundedSharedBytes(params.shape.head_dim)));
    auto* shared = reinterpret_cast<BoundedShared*>(memory.back().get());
    for (int32_t thread = 0; thread < kThreads; ++thread) {
      const HostTeam mine{
          cta, kCtas, thread, kThreads, thread, kThreads, 0, barriers.back().get(), &team, &adding};
      threads.emplace_back([&params, sequence, head, mine, shared] {
        BoundedHeadStep<HostTeam>(params, sequence, head, mine, *shared).Run();
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace adaattn

#endif  // ADAATTN_TESTS_UNIT_HOST_TEAM_H_

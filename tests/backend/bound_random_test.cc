// Error bounds on caches, queries and targets of every kind: they hold, always. `make bound-check`
// tries a million outputs on all cores.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "kernels/mutex.h"
#include "tests/backend/bound_judge.h"
#include "tests/backend/progressive_harness.h"

namespace adaattn {
namespace {

constexpr int64_t kProgressEvery = 100000;

int32_t Pick(std::mt19937* random, int32_t count) {
  return static_cast<int32_t>((*random)() % static_cast<uint32_t>(count));
}

// Caches, queries and targets of every kind.
ProgressiveOptions RandomOptions(std::mt19937* random) {
  constexpr int32_t kDims[] = {64, 80, 96, 128};
  constexpr DType kOutTypes[] = {DType::kF32, DType::kBf16, DType::kF16};
  constexpr PageFormat kFormats[] = {PageFormat::kProgressive, PageFormat::kProgressiveF16};
  ProgressiveOptions options;
  const int32_t kv_heads = 1 + Pick(random, 2);
  options.shape = {kv_heads * (1 + Pick(random, 4)), kv_heads, kDims[Pick(random, 4)]};
  options.format = kFormats[Pick(random, 2)];
  options.length = 256 + Pick(random, 700);
  options.stored_bits = 4 + 2 * Pick(random, 3);
  options.num_bases = 1 + Pick(random, 2);
  options.seed = static_cast<uint32_t>((*random)());
  options.keep_exact = Pick(random, 4) != 0;
  options.out_type = kOutTypes[Pick(random, 3)];
  options.num_threads = 1;
  if (Pick(random, 4) == 0) options.outlier = std::exp2(static_cast<float>(1 + Pick(random, 8)));
  return options;
}

// Turns every query toward the key of one token, far enough for it to get all of the mass or less.
void AimAtOneToken(const TestSequence& sequence, const AttentionShape& shape, std::mt19937* random,
                   StepCase* step) {
  const int64_t token = Pick(random, static_cast<int32_t>(sequence.length));
  const float strength = std::exp2(static_cast<float>(Pick(random, 8) - 2));
  const int32_t d = shape.head_dim;
  for (size_t i = 0; i < step->q.size() / d; ++i) {
    const auto q_head = static_cast<int32_t>(i % shape.num_q_heads);
    const float* key = &sequence.k[(token * shape.num_kv_heads + q_head / shape.group_size()) * d];
    float square = 0;
    for (int32_t c = 0; c < d; ++c) square += key[c] * key[c];
    const float scale = strength * std::sqrt(static_cast<float>(d) / square);
    for (int32_t c = 0; c < d; ++c) step->q[i * d + c] += scale * key[c];
  }
}

StepCase RandomStep(ProgressiveHarness* cache, std::mt19937* random, bool* one_token) {
  StepCase step = cache->NewStep(1 + Pick(random, 8));
  // From flat attention to a single token.
  const float sharpness = std::exp2(static_cast<float>(Pick(random, 9) - 6));
  for (float& value : step.q) value *= sharpness;
  *one_token = Pick(random, 4) == 0;
  if (*one_token) {
    AimAtOneToken(cache->sequence(), cache->harness().options().shape, random, &step);
  }
  if (Pick(random, 4) == 0) step.window = 64 + Pick(random, 300);
  if (Pick(random, 4) == 0) step.softcap = static_cast<float>(5 + Pick(random, 50));
  step.decision = Bounded(std::exp2(-static_cast<float>(Pick(random, 12))));
  if (Pick(random, 3) == 0) {
    step.decision.policy = Policy::kThreshold;
    step.decision.theta = std::exp2(-static_cast<float>(2 + Pick(random, 10)));
  }
  return step;
}

// Threads that try random caches until `wanted` outputs were judged.
class RandomTrial {
 public:
  explicit RandomTrial(int64_t wanted) : wanted_(wanted) {}

  Tally Run() {
    const auto num_threads = static_cast<uint32_t>(
        wanted_ > kShortHeadSteps ? std::max(1u, std::thread::hardware_concurrency()) : 1);
    std::vector<std::thread> threads;
    for (uint32_t i = 0; i < num_threads; ++i) threads.emplace_back([this, i] { Try(20 + i); });
    for (std::thread& thread : threads) thread.join();
    MutexLock lock(&mutex_);
    return tally_;
  }

 private:
  void Try(uint32_t seed) {
    std::mt19937 random(seed);
    while (judged_.load() < wanted_ && !violated_.load()) {
      const ProgressiveOptions options = RandomOptions(&random);
      ProgressiveHarness cache(options);
      if (!cache.harness().ok()) return;
      Tally own;
      for (int i = 0; i < 24; ++i) {
        bool one_token = false;
        const StepCase step = RandomStep(&cache, &random, &one_token);
        const int64_t before = own.head_steps;
        JudgeStep(options.shape, step, cache.harness().Run({step})[0], &own);
        if (one_token) own.one_token += own.head_steps - before;
        if (options.outlier > 1) own.outliers += own.head_steps - before;
      }
      if (own.violations > 0) violated_.store(true);
      Count(own);
    }
  }

  void Count(const Tally& own) {
    const int64_t before = judged_.fetch_add(own.head_steps);
    MutexLock lock(&mutex_);
    tally_.Add(own);
    if (before / kProgressEvery == (before + own.head_steps) / kProgressEvery) return;
    std::printf("%lld of %lld head-steps, %lld violations\n",
                static_cast<long long>(tally_.head_steps), static_cast<long long>(wanted_),
                static_cast<long long>(tally_.violations));
    std::fflush(stdout);
  }

  const int64_t wanted_;
  std::atomic<int64_t> judged_{0};
  std::atomic<bool> violated_{false};
  Mutex mutex_;
  Tally tally_ ABSL_GUARDED_BY(mutex_);
};

TEST(BoundTest, IsNeverViolatedOnRandomInputs) {
  SKIP_WITHOUT_BOUNDS();
  const int64_t wanted = HeadStepsToTry();
  const Tally tally = RandomTrial(wanted).Run();
  tally.Print("random");
  EXPECT_GE(tally.head_steps, wanted) << "it stopped before its end";
  EXPECT_EQ(tally.violations, 0);
  EXPECT_GT(tally.one_token, 0);
  EXPECT_GT(tally.outliers, 0);
  EXPECT_GT(tally.tightest, 0.01) << "a bound this loose says nothing";
}

}  // namespace
}  // namespace adaattn

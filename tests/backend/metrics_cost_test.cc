// What watching costs: the metrics' share of the engine's time at full load, and the time of a
// scrape with very many sessions open.

#include <gtest/gtest.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "server/clock.h"
#include "server/metrics.h"
#include "tests/unit/engine_harness.h"

namespace adaattn {
namespace {

constexpr int32_t kSequences = 16, kTokens = 1024, kHeadDim = 64;
constexpr int kStepsPerBlock = 20, kBlocks = 12;

// Of the calling thread: other processes do not count.
double CpuSeconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Passes everything on to the metrics, or nothing, and keeps the engine thread's books.
class SwitchedObserver final : public EngineObserver {
 public:
  explicit SwitchedObserver(Metrics* metrics) : metrics_(metrics) {}

  void OnBatch(const BatchReport& report) override {
    Watch([&] { metrics_->OnBatch(report); });
  }
  void OnSeal(const SealReport& report) override {
    Watch([&] { metrics_->OnSeal(report); });
  }
  void OnGauges(const GaugeReport& report) override {
    Watch([&] { metrics_->OnGauges(report); });
    const MutexLock lock(&mutex_);
    thread_seconds_ = CpuSeconds();
  }

  void SwitchOn(bool on) {
    const MutexLock lock(&mutex_);
    on_ = on;
  }
  double watching_seconds() {
    const MutexLock lock(&mutex_);
    return watching_seconds_;
  }
  double thread_seconds() {
    const MutexLock lock(&mutex_);
    return thread_seconds_;
  }

 private:
  template <typename Work>
  void Watch(const Work& work) {
    const MutexLock lock(&mutex_);
    if (!on_) return;
    const double begin = CpuSeconds();
    work();
    watching_seconds_ += CpuSeconds() - begin;
  }

  Metrics* const metrics_;
  Mutex mutex_;
  bool on_ ABSL_GUARDED_BY(mutex_) = true;
  double watching_seconds_ ABSL_GUARDED_BY(mutex_) = 0;
  double thread_seconds_ ABSL_GUARDED_BY(mutex_) = 0;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

class MetricsCostTest : public testing::Test {
 protected:
  MetricsCostTest()
      : metrics_({"1.0", "abc", "cc", "cpu", "device", "avx2"}),
        observer_(&metrics_),
        table_(TableOptions(), SystemClock::Get()) {}

  static SessionTableOptions TableOptions() {
    SessionTableOptions options;
    options.instance = "test";
    options.max_sessions = options.max_tenant_sessions = 20000;
    return options;
  }

  void StartEngine() {
    BackendOptions backend;
    backend.pool_bytes = int64_t{64} << 20;
    backend.num_threads = 1;  // the engine's own: its CPU time is all there is
    backend_ = *CreateCpuBackend(backend);
    EngineOptions options;
    options.audit_share = 0;
    engine_ =
        std::make_unique<Engine>(options, backend_.get(), &table_, &observer_, SystemClock::Get());
    ASSERT_TRUE(engine_->Start([](const absl::Status&) {}).ok());
    SessionConfig config = TestConfig(PageFormat::kProgressive);
    config.shape = {/*num_q_heads=*/8, /*num_kv_heads=*/4, kHeadDim};
    for (int32_t i = 0; i < kSequences; ++i) sessions_.push_back(*table_.Open(config));
    Step(kTokens);
    engine_->Quiesce();
  }

  // Appends `tokens` to every session and attends once, all in one batch.
  void Step(int32_t tokens) {
    TaskBuilder builder(sessions_[0]);
    for (const auto& session : sessions_) {
      builder.Add(session, length_, static_cast<uint64_t>(++step_), tokens, 1, 1);
    }
    std::normal_distribution<float> normal;
    for (std::vector<float>* rows :
         {&builder.payload()->q, &builder.payload()->k, &builder.payload()->v}) {
      for (float& value : *rows) value = normal(random_);
    }
    std::unique_ptr<AttentionTask> task = builder.Build(&mailbox_);
    ASSERT_TRUE(engine_->Schedule(&task).ok());
    task = mailbox_.Take();
    ASSERT_TRUE(task->reply.status.ok()) << task->reply.status;
    for (const SequenceOutcome& sequence : task->reply.sequences) {
      ASSERT_TRUE(sequence.status.ok()) << sequence.status;
    }
    length_ += tokens;
  }

  // CPU seconds of the engine's thread for a step.
  double RunBlock() {
    const double begin = observer_.thread_seconds();
    for (int i = 0; i < kStepsPerBlock; ++i) Step(1);
    return (observer_.thread_seconds() - begin) / kStepsPerBlock;
  }

  Metrics metrics_;
  SwitchedObserver observer_;
  SessionTable table_;
  TaskMailbox mailbox_;
  std::mt19937 random_{7};
  int64_t length_ = 0, step_ = 0;
  std::vector<std::shared_ptr<Session>> sessions_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Engine> engine_;
};

TEST_F(MetricsCostTest, TakeAtMostTwoPercentOfTheEnginesTime) {
  StartEngine();
  for (int i = 0; i < kStepsPerBlock; ++i) Step(1);
  std::vector<double> on, off;
  const double watching = observer_.watching_seconds();
  double total_on = 0;
  for (int block = 0; block < kBlocks; ++block) {
    observer_.SwitchOn(true);
    on.push_back(RunBlock());
    total_on += on.back() * kStepsPerBlock;
    observer_.SwitchOn(false);
    off.push_back(RunBlock());
  }
  observer_.SwitchOn(true);
  const double share = (observer_.watching_seconds() - watching) / total_on;
  std::printf("metrics: %.2f %% of the engine's CPU time; %.1f us a step with, %.1f without\n",
              100 * share, 1e6 * Median(on), 1e6 * Median(off));
  EXPECT_GT(share, 0);
  EXPECT_LE(share, 0.02);
  engine_->Stop(absl::InfiniteFuture());
}

TEST_F(MetricsCostTest, AScrapeOfTenThousandSessionsTakesLessThanTenMilliseconds) {
  for (int i = 0; i < 10000; ++i) {
    const auto session = table_.Open(TestConfig(PageFormat::kProgressive));
    ASSERT_TRUE(session.ok()) << session.status();
  }
  GaugeReport gauges;
  gauges.sessions = 10000;
  metrics_.OnGauges(gauges);
  double fastest = 1;
  for (int i = 0; i < 20; ++i) {
    const double begin = CpuSeconds();
    const std::string text = metrics_.Serialize();
    fastest = std::min(fastest, CpuSeconds() - begin);
    ASSERT_NE(text.find("adaattn_sessions 10000\n"), std::string::npos);
    ASSERT_LE(std::count(text.begin(), text.end(), '\n'), 1500 + 200) << "series, and their help";
  }
  std::printf("scrape: %.2f ms\n", 1e3 * fastest);
  EXPECT_LT(fastest, 0.010);
}

}  // namespace
}  // namespace adaattn

// What watching costs: the metrics' share of the engine's time and of the steps a second at full
// load, and the time of a scrape with very many sessions open.

#include <gtest/gtest.h>
#include <time.h>

#include <algorithm>
#include <cmath>
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
// Short enough that whatever else the machine does meets both rounds of most pairs alike.
constexpr int kStepsPerRound = 2, kPairsAtOnce = 100;
constexpr double kMostCost = 0.02;
constexpr double kSharpness = 0.005;  // half of the interval that a cost must be known to
constexpr absl::Duration kPatience = absl::Seconds(30);

// Of the calling thread: other processes do not count.
double CpuSeconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Passes everything on to the metrics, or nothing, and keeps the engine thread's books. May burn
// time at every batch, as metrics would that cost more.
class SwitchedObserver final : public EngineObserver {
 public:
  explicit SwitchedObserver(Metrics* metrics) : metrics_(metrics) {}

  void OnBatch(const BatchReport& report) override {
    Watch([&] {
      metrics_->OnBatch(report);
      const double end = CpuSeconds() + burn_seconds_;
      while (CpuSeconds() < end) {
      }
    });
  }
  void OnSeal(const SealReport& report) override {
    Watch([&] { metrics_->OnSeal(report); });
  }
  void OnGauges(const GaugeReport& report) override {
    Watch([&] { metrics_->OnGauges(report); });
    const MutexLock lock(&mutex_);
    thread_seconds_ = CpuSeconds();
  }

  void SwitchOn(bool on, double burn_seconds = 0) {
    const MutexLock lock(&mutex_);
    on_ = on;
    burn_seconds_ = burn_seconds;
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
  double burn_seconds_ ABSL_GUARDED_BY(mutex_) = 0;
  double watching_seconds_ ABSL_GUARDED_BY(mutex_) = 0;
  double thread_seconds_ ABSL_GUARDED_BY(mutex_) = 0;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// A median, and the interval that holds it with 99 % confidence.
struct Interval {
  double low, median, high;
};

Interval MedianInterval(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const double size = static_cast<double>(values.size()), off = 2.576 * std::sqrt(size) / 2;
  const auto at = [&values](double index) { return values[static_cast<size_t>(index)]; };
  return {at(std::max(0.0, size / 2 - off)), at(size / 2), at(std::min(size - 1, size / 2 + off))};
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
    config.lease = absl::Hours(1);
    config.shape = {/*num_q_heads=*/8, /*num_kv_heads=*/4, kHeadDim};
    for (int32_t i = 0; i < kSequences; ++i) sessions_.push_back(*table_.Open(config));
    Step(kTokens);
    engine_->Quiesce();
  }

  TaskBuilder Task(int32_t tokens) {
    TaskBuilder builder(sessions_[0]);
    for (const auto& session : sessions_) {
      builder.Add(session, length_, static_cast<uint64_t>(++step_), tokens, 1, 1);
    }
    return builder;
  }

  // Appends `tokens` to every session and attends once, all in one batch.
  void Step(int32_t tokens) {
    TaskBuilder builder = Task(tokens);
    std::normal_distribution<float> normal;
    for (std::vector<float>* rows :
         {&builder.payload()->q, &builder.payload()->k, &builder.payload()->v}) {
      for (float& value : *rows) value = normal(random_);
    }
    Run(builder.Build(&mailbox_));
    length_ += tokens;
  }

  void Run(std::unique_ptr<AttentionTask> task) {
    ASSERT_TRUE(engine_->Schedule(&task).ok());
    task = mailbox_.Take();
    ASSERT_TRUE(task->reply.status.ok()) << task->reply.status;
    for (const SequenceOutcome& sequence : task->reply.sequences) {
      ASSERT_TRUE(sequence.status.ok()) << sequence.status;
    }
  }

  // CPU seconds of the engine's thread for a step.
  double RunBlock() {
    const double begin = observer_.thread_seconds();
    for (int i = 0; i < kStepsPerBlock; ++i) Step(1);
    return (observer_.thread_seconds() - begin) / kStepsPerBlock;
  }

  // Seconds of a step without an append, which leaves every step the same work; with what the
  // service counts of a message where metrics are on.
  double RunRound(bool on, double burn_seconds) {
    observer_.SwitchOn(on, burn_seconds);
    const absl::Time begin = absl::Now();
    for (int i = 0; i < kStepsPerRound; ++i) {
      Run(Task(0).Build(&mailbox_));
      if (!on) continue;
      metrics_.OnWire(WireDirection::kIn, WireTransport::kTcp, 4096);
      metrics_.OnWire(WireDirection::kOut, WireTransport::kTcp, 4096);
      metrics_.OnRequest(RpcMethod::kAttendStream, 0, absl::Microseconds(500));
    }
    return absl::ToDoubleSeconds(absl::Now() - begin) / kStepsPerRound;
  }

  // The share of the steps a second that watching takes, from pairs of rounds with and without.
  Interval StepsLost(double burn_seconds) {
    std::vector<double> lost, with, without;
    Interval interval{};
    const absl::Time deadline = absl::Now() + kPatience;
    do {
      for (int pair = 0; pair < kPairsAtOnce; ++pair) {
        const bool first = pair % 2 == 0;  // so that no drift of the machine favours one
        const double a = RunRound(first, burn_seconds), b = RunRound(!first, burn_seconds);
        with.push_back(first ? a : b);
        without.push_back(first ? b : a);
        lost.push_back(1 - without.back() / with.back());
        if (HasFatalFailure()) return {};
      }
      interval = MedianInterval(lost);
    } while (interval.high - interval.low > 2 * kSharpness && absl::Now() < deadline);
    std::printf(
        "metrics: %.2f %% of the steps a second [%.2f, %.2f]; %.0f with, %.0f without, "
        "%zu pairs\n",
        100 * interval.median, 100 * interval.low, 100 * interval.high, kSequences / Median(with),
        kSequences / Median(without), lost.size());
    return interval;
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
  EXPECT_LE(share, kMostCost);
  engine_->Stop(absl::InfiniteFuture());
}

TEST_F(MetricsCostTest, TakeAtMostTwoPercentOfTheStepsASecond) {
  StartEngine();
  const double step_seconds = RunRound(false, 0);
  // What took three times as much would be seen.
  EXPECT_GT(StepsLost(3 * kMostCost * step_seconds).low, kMostCost);
  EXPECT_LE(StepsLost(0).median, kMostCost);
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

#ifndef ADAATTN_TESTS_UNIT_ENGINE_FIXTURE_H_
#define ADAATTN_TESTS_UNIT_ENGINE_FIXTURE_H_

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "tests/unit/engine_harness.h"
#include "tests/unit/fake_backend.h"
#include "tests/unit/fake_clock.h"

namespace adaattn {

// Copies what the engine reports. Read it after Quiesce() or Stop().
class RecordingObserver final : public EngineObserver {
 public:
  struct Audit {
    bool exact = false;
    std::vector<float> actual, predicted, bounds;
  };

  void OnBatch(const BatchReport& report) override {
    ++batches;
    q_tokens += report.q_tokens;
    appended_tokens += report.appended_tokens;
    for (const StepReport& step : report.steps) {
      codes.push_back(step.code);
      if (step.attended) pages_sealed += step.decision->pages_sealed;
    }
  }
  void OnSeal(const SealReport& report) override {
    sealed += report.pages_sealed;
    fitted += report.bases_fitted;
    deferred += report.pages_deferred;
  }
  void OnAudit(const AuditReport& report) override {
    audits.push_back({report.exact_reference,
                      {report.actual.begin(), report.actual.end()},
                      {report.predicted.begin(), report.predicted.end()},
                      {report.bounds.begin(), report.bounds.end()}});
  }
  void OnGauges(const GaugeReport& report) override { gauges = report; }
  void OnSessionEvent(SessionEvent event, int64_t count) override {
    if (event == SessionEvent::kExpired) expired += count;
  }

  int64_t batches = 0, q_tokens = 0, appended_tokens = 0, pages_sealed = 0;
  int64_t sealed = 0, fitted = 0, expired = 0;
  std::atomic<int64_t> deferred{0};  // grows while nothing else happens
  std::vector<absl::StatusCode> codes;
  std::vector<Audit> audits;
  GaugeReport gauges;
};

// An engine over the fake backend. Every test ends with no page in use.
class EngineFixture : public testing::Test {
 protected:
  EngineFixture() : table_(TableOptions(), &clock_) {
    options_.pages.slab_bytes = 32768;  // one BF16 page of the test shape is 16384 bytes
    options_.pages.reserved_slabs = 2;
    options_.batcher.max_batch_q_bytes = 1 << 20;
    options_.batcher.max_batch_kv_bytes = 1 << 20;
    options_.batcher.max_delay = absl::ZeroDuration();
    options_.seal.fit_tokens = 256;
    options_.audit_share = 0;
  }
  void TearDown() override {
    if (engine_ == nullptr) return;
    engine_->Stop(absl::InfiniteFuture());
    EXPECT_EQ(engine_->page_stats().total_pages(), 0) << "pages leaked";
    EXPECT_EQ(engine_->page_stats().free_bytes, engine_->page_stats().pool_bytes);
    EXPECT_EQ(engine_->page_stats().exact_tier_free_bytes, engine_->page_stats().exact_tier_bytes);
  }

  static SessionTableOptions TableOptions() {
    SessionTableOptions options;
    options.instance = "test";
    return options;
  }

  Engine& engine() {
    if (engine_ == nullptr) {
      if (backend_ == nullptr) backend_ = std::make_unique<FakeBackend>(pool_bytes_, tier_bytes_);
      engine_ = std::make_unique<Engine>(options_, backend_.get(), &table_, &observer_, &clock_);
      EXPECT_TRUE(engine_->Start([this](const absl::Status& status) { lost_.Put(status); }).ok());
    }
    return *engine_;
  }
  FakeBackend& backend() {
    if (backend_ == nullptr) backend_ = std::make_unique<FakeBackend>(pool_bytes_, tier_bytes_);
    return *backend_;
  }

  std::shared_ptr<Session> Open(const SessionConfig& config) { return *table_.Open(config); }
  std::shared_ptr<Session> Open(PageFormat format = PageFormat::kBf16, int32_t num_layers = 1) {
    return Open(TestConfig(format, num_layers));
  }

  std::unique_ptr<AttentionTask> Run(TaskBuilder builder) {
    std::unique_ptr<AttentionTask> task = builder.Build(&mailbox_);
    const absl::Status status = engine().Schedule(&task);
    if (!status.ok()) {
      ADD_FAILURE() << status;
      return task;
    }
    return mailbox_.Take();
  }
  // Appends tokens of value 1 to one layer, as one step that also attends a row, and returns what
  // the row sees: their sum, which is the length.
  float AppendOnes(const std::shared_ptr<Session>& session, int64_t position, int32_t count,
                   int32_t layer = 0) {
    TaskBuilder builder(session, layer);
    builder.Add(session, position, static_cast<uint64_t>(position + 1), count, 1, 1);
    FillOnes(&builder);
    const auto task = Run(std::move(builder));
    EXPECT_TRUE(task->reply.sequences[0].status.ok()) << task->reply.sequences[0].status;
    return task->reply.sequences[0].status.ok() ? OutAt(*task, 0) : -1;
  }
  static void FillOnes(TaskBuilder* builder) {
    for (float& value : builder->payload()->k) value = 1;
  }
  // What a row at the end of the layer sees, without an append.
  float Look(const std::shared_ptr<Session>& session, int64_t position, int32_t layer = 0) {
    TaskBuilder builder(session, layer);
    builder.Add(session, position, 0, 0, 1, 0);
    const auto task = Run(std::move(builder));
    EXPECT_TRUE(task->reply.sequences[0].status.ok()) << task->reply.sequences[0].status;
    return task->reply.sequences[0].status.ok() ? OutAt(*task, 0) : -1;
  }
  // Runs `work(control)` on the engine thread and waits.
  template <typename Work>
  auto Control(Work work) -> decltype(work(static_cast<SessionControl*>(nullptr))) {
    using Result = decltype(work(static_cast<SessionControl*>(nullptr)));
    Mailbox<std::unique_ptr<Result>> result;
    EXPECT_TRUE(
        engine().Post([&] { result.Put(std::make_unique<Result>(work(engine_->control()))); }));
    return *result.Take();
  }

  FakeClock clock_;
  SessionTable table_;
  EngineOptions options_;
  int64_t pool_bytes_ = int64_t{4} << 20;
  int64_t tier_bytes_ = 0;
  RecordingObserver observer_;
  TaskMailbox mailbox_;
  Mailbox<absl::Status> lost_;
  std::unique_ptr<FakeBackend> backend_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace adaattn

#endif  // ADAATTN_TESTS_UNIT_ENGINE_FIXTURE_H_

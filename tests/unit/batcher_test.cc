#include "server/batcher.h"

#include <gtest/gtest.h>

#include <thread>

#include "absl/strings/match.h"
#include "tests/unit/engine_harness.h"
#include "tests/unit/fake_clock.h"

namespace adaattn {
namespace {

SessionTableOptions TableOptions() {
  SessionTableOptions options;
  options.instance = "test";
  return options;
}

class BatcherTest : public testing::Test {
 protected:
  BatcherTest() : table_(TableOptions(), &clock_) {
    options_.max_delay = absl::ZeroDuration();
    options_.spin = absl::ZeroDuration();
  }

  Batcher& batcher() {
    if (batcher_ == nullptr) batcher_ = std::make_unique<Batcher>(options_, &clock_);
    return *batcher_;
  }
  std::shared_ptr<Session> Open(PageFormat format = PageFormat::kBf16) {
    return *table_.Open(TestConfig(format, 8));
  }
  std::unique_ptr<AttentionTask> Step(const std::shared_ptr<Session>& session, int32_t layer = 0,
                                      int32_t q_len = 1) {
    return TaskBuilder(session, layer).Add(session, 0, 1, 0, q_len, 0).Build(nullptr);
  }
  absl::Status Schedule(std::unique_ptr<AttentionTask> task) {
    absl::Status status = batcher().Schedule(&task);
    EXPECT_EQ(status.ok(), task == nullptr) << "taken on OK and only then";
    return status;
  }
  // Layers of the tasks of the next batch; empty when none is due.
  std::vector<int32_t> PollLayers() {
    std::vector<int32_t> layers;
    Batcher::Work work = batcher().Poll();
    for (size_t i = 0; work.batch != nullptr && i < work.batch->tasks.size(); ++i) {
      layers.push_back(work.batch->tasks[i]->layer);
      FinishTask(std::move(work.batch->tasks[i]));
    }
    return layers;
  }

  FakeClock clock_;
  SessionTable table_;
  BatcherOptions options_;
  std::unique_ptr<Batcher> batcher_;
};

using Layers = std::vector<int32_t>;

TEST_F(BatcherTest, ASingleTaskIsDueAtOnce) {
  options_.max_delay = absl::Seconds(1);
  ASSERT_TRUE(Schedule(Step(Open(), 3)).ok());
  EXPECT_EQ(PollLayers(), Layers({3}));
  EXPECT_EQ(PollLayers(), Layers());
}

TEST_F(BatcherTest, SessionsStepTogether) {
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(Schedule(Step(Open(), i)).ok());
  EXPECT_EQ(batcher().load().tasks, 5);
  EXPECT_EQ(PollLayers(), Layers({0, 1, 2, 3, 4}));
  EXPECT_EQ(batcher().load().tasks, 0);
  EXPECT_EQ(batcher().load().bytes, 0);
}

TEST_F(BatcherTest, NoLayerOfASessionIsTwiceInABatch) {
  const auto session = Open();
  ASSERT_TRUE(Schedule(Step(session, 1)).ok());
  ASSERT_TRUE(Schedule(Step(session, 1, 2)).ok());
  ASSERT_TRUE(Schedule(Step(session, 2)).ok());
  EXPECT_EQ(PollLayers(), Layers({1, 2}));
  EXPECT_EQ(PollLayers(), Layers({1}));
}

TEST_F(BatcherTest, StepsOfALayerStayInOrderEvenWhenPassedOver) {
  const auto session = Open();
  auto exact = Step(session, 1);
  exact->exact = true;
  ASSERT_TRUE(Schedule(Step(Open(), 0)).ok());
  ASSERT_TRUE(Schedule(std::move(exact)).ok());  // not of the first one's kind
  ASSERT_TRUE(Schedule(Step(session, 1)).ok());  // would go, but must not overtake
  ASSERT_TRUE(Schedule(Step(Open(), 2)).ok());
  EXPECT_EQ(PollLayers(), Layers({0, 2}));
  EXPECT_EQ(PollLayers(), Layers({1}));
  EXPECT_EQ(PollLayers(), Layers({1}));
}

TEST_F(BatcherTest, TypesFormatsAndShapesPart) {
  const auto bf16 = Open();
  const auto fp8 = Open(PageFormat::kF8E4m3);
  auto half_out = Step(Open(), 2);
  half_out->out_type = DType::kF16;
  ASSERT_TRUE(Schedule(Step(bf16, 0)).ok());
  ASSERT_TRUE(Schedule(Step(fp8, 1)).ok());
  ASSERT_TRUE(Schedule(std::move(half_out)).ok());
  ASSERT_TRUE(Schedule(Step(Open(), 3)).ok());
  EXPECT_EQ(PollLayers(), Layers({0, 3}));
  EXPECT_EQ(PollLayers(), Layers({1}));
  EXPECT_EQ(PollLayers(), Layers({2}));
}

TEST_F(BatcherTest, ClosesByTokens) {
  options_.max_batch_tokens = 5;
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Schedule(Step(Open(), i, 2)).ok());
  EXPECT_EQ(PollLayers(), Layers({0, 1}));
  EXPECT_EQ(PollLayers(), Layers({2}));
}

TEST_F(BatcherTest, ClosesByBytes) {
  options_.max_batch_q_bytes = 2 * 2 * 64 * sizeof(float);  // two rows
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Schedule(Step(Open(), i)).ok());
  EXPECT_EQ(PollLayers(), Layers({0, 1}));
  EXPECT_EQ(PollLayers(), Layers({2}));
}

TEST_F(BatcherTest, ClosesBySequences) {
  options_.max_batch_sequences = 2;
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Schedule(Step(Open(), i)).ok());
  EXPECT_EQ(PollLayers(), Layers({0, 1}));
}

TEST_F(BatcherTest, WaitsForThoseWhoWereInTheLastBatch) {
  options_.max_delay = absl::Microseconds(100);
  const auto first = Open(), second = Open();
  ASSERT_TRUE(Schedule(Step(first, 0)).ok());
  ASSERT_TRUE(Schedule(Step(second, 1)).ok());
  EXPECT_EQ(PollLayers(), Layers({0, 1}));

  ASSERT_TRUE(Schedule(Step(first, 0)).ok());
  EXPECT_EQ(PollLayers(), Layers());
  ASSERT_TRUE(Schedule(Step(second, 1)).ok());
  EXPECT_EQ(PollLayers(), Layers({0, 1}));

  ASSERT_TRUE(Schedule(Step(first, 0)).ok());
  clock_.Advance(absl::Microseconds(99));
  EXPECT_EQ(PollLayers(), Layers());
  clock_.Advance(absl::Microseconds(1));
  EXPECT_EQ(PollLayers(), Layers({0}));

  // Nobody else came: the next one alone does not wait.
  ASSERT_TRUE(Schedule(Step(first, 0)).ok());
  EXPECT_EQ(PollLayers(), Layers({0}));
}

TEST_F(BatcherTest, ANearDeadlineEndsTheWait) {
  options_.max_delay = absl::Milliseconds(10);
  const auto first = Open(), second = Open();
  ASSERT_TRUE(Schedule(Step(first, 0)).ok());
  ASSERT_TRUE(Schedule(Step(second, 1)).ok());
  EXPECT_EQ(PollLayers(), Layers({0, 1}));
  auto hurried = Step(first, 0);
  hurried->deadline = clock_.Now() + absl::Milliseconds(2);
  ASSERT_TRUE(Schedule(std::move(hurried)).ok());
  EXPECT_EQ(PollLayers(), Layers());
  clock_.Advance(absl::Milliseconds(2));
  EXPECT_EQ(PollLayers(), Layers({0}));
}

TEST_F(BatcherTest, PastDeadlinesAreRefusedOnArrival) {
  auto late = Step(Open());
  late->deadline = clock_.Now();
  EXPECT_TRUE(absl::IsDeadlineExceeded(Schedule(std::move(late))));
}

TEST_F(BatcherTest, TellsFullFromNeverFits) {
  options_.max_queued_tasks = 2;
  options_.max_batch_tokens = 4;
  EXPECT_TRUE(absl::IsInvalidArgument(Schedule(Step(Open(), 0, 5))));
  ASSERT_TRUE(Schedule(Step(Open())).ok());
  ASSERT_TRUE(Schedule(Step(Open())).ok());
  const absl::Status full = Schedule(Step(Open()));
  EXPECT_TRUE(absl::IsResourceExhausted(full));
  EXPECT_TRUE(absl::StrContains(full.message(), "queue full: it holds its limit of 2 messages"))
      << full;
  EXPECT_GE(batcher().retry_after(), absl::Milliseconds(1));
  EXPECT_EQ(PollLayers().size(), 2u);
  EXPECT_TRUE(Schedule(Step(Open())).ok());
  EXPECT_EQ(PollLayers().size(), 1u);
}

TEST_F(BatcherTest, LimitsQueuedTokensAndBytes) {
  options_.max_queued_tokens = 3;
  ASSERT_TRUE(Schedule(Step(Open(), 0, 2)).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(Schedule(Step(Open(), 0, 2))));
  EXPECT_TRUE(Schedule(Step(Open(), 0, 1)).ok());
  EXPECT_DOUBLE_EQ(batcher().load().fraction, 1);
  PollLayers();

  options_.max_queued_bytes = 2 * 64 * sizeof(float);
  batcher_ = nullptr;
  ASSERT_TRUE(Schedule(Step(Open())).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(Schedule(Step(Open()))));
  PollLayers();
}

TEST_F(BatcherTest, HoldsTheSessionsOfQueuedTasks) {
  const auto session = Open();
  ASSERT_TRUE(Schedule(Step(session)).ok());
  EXPECT_TRUE(session->in_use());
  PollLayers();
  EXPECT_FALSE(session->in_use());
}

TEST_F(BatcherTest, HandsOutPostedWorkInOrder) {
  std::vector<int> ran;
  ASSERT_TRUE(batcher().Post([&] { ran.push_back(1); }));
  ASSERT_TRUE(batcher().Post([&] { ran.push_back(2); }));
  ASSERT_TRUE(Schedule(Step(Open())).ok());
  Batcher::Work work = batcher().Poll();
  for (const auto& posted : work.posted) posted();
  EXPECT_EQ(ran, std::vector<int>({1, 2}));
  ASSERT_NE(work.batch, nullptr);
  FinishTask(std::move(work.batch->tasks[0]));
}

TEST_F(BatcherTest, ShutdownDrainsAndThenFinishes) {
  ASSERT_TRUE(Schedule(Step(Open(), 6)).ok());
  batcher().Shutdown();
  EXPECT_TRUE(absl::IsUnavailable(Schedule(Step(Open()))));
  EXPECT_TRUE(batcher().Post([] {}));
  EXPECT_EQ(PollLayers(), Layers({6}));
  EXPECT_TRUE(batcher().Poll().finished);
  EXPECT_FALSE(batcher().Post([] {}));
}

TEST_F(BatcherTest, TakeAllEmptiesTheQueue) {
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Schedule(Step(Open(), i)).ok());
  auto tasks = batcher().TakeAll();
  EXPECT_EQ(tasks.size(), 3u);
  EXPECT_EQ(batcher().load().tokens, 0);
  for (auto& task : tasks) FailTask(std::move(task), absl::UnavailableError("gone"), {});
  EXPECT_EQ(PollLayers(), Layers());
}

TEST_F(BatcherTest, NextWakesForWorkOfOtherThreads) {
  const auto session = Open();
  batcher();
  std::thread producer([&] {
    for (int i = 0; i < 200; ++i) {
      std::unique_ptr<AttentionTask> task = Step(session, i % 8);
      ASSERT_TRUE(batcher_->Schedule(&task).ok());
    }
    batcher_->Shutdown();
  });
  size_t seen = 0;
  while (true) {
    Batcher::Work work = batcher_->Next(absl::Seconds(30));
    if (work.finished) break;
    ASSERT_NE(work.batch, nullptr);
    seen += work.batch->tasks.size();
    for (auto& task : work.batch->tasks) FinishTask(std::move(task));
  }
  producer.join();
  EXPECT_EQ(seen, 200u);
}

}  // namespace
}  // namespace adaattn

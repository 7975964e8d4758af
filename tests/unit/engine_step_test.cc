#include <gtest/gtest.h>

#include <limits>
#include <thread>

#include "absl/strings/match.h"
#include "server/decision_summary.h"
#include "tests/unit/engine_fixture.h"

namespace adaattn {
namespace {

class EngineStepTest : public EngineFixture {
 protected:
  static SequenceOutcome First(const AttentionTask& task) { return task.reply.sequences.at(0); }
};

TEST_F(EngineStepTest, AppendsAndAttends) {
  const auto session = Open();
  TaskBuilder builder(session);
  builder.Add(session, 0, 1, 3, 2, /*first_value=*/10);
  const auto task = Run(std::move(builder));
  ASSERT_TRUE(First(*task).status.ok()) << First(*task).status;
  EXPECT_EQ(First(*task).kv_len, 3);
  EXPECT_TRUE(First(*task).attended);
  EXPECT_EQ(OutAt(*task, 0), 10 + 11);
  EXPECT_EQ(OutAt(*task, 1), 10 + 11 + 12);
  EXPECT_EQ(LseAt(*task, 1), 3);
  EXPECT_EQ(First(*task).decision.bytes_bf16, 3 * 64 * 2 * 2);
}

TEST_F(EngineStepTest, GrowsOverManyPages) {
  const auto session = Open();
  int64_t length = 0;
  for (const int32_t count : {1, 62, 1, 1, 63, 128, 65, 7}) {
    EXPECT_EQ(AppendOnes(session, length, count), length + count);
    length += count;
  }
  EXPECT_EQ(engine().page_stats().pages[0], (length + 63) / 64);
}

TEST_F(EngineStepTest, AttendsAnEmptyCache) {
  const auto session = Open();
  TaskBuilder builder(session);
  builder.Add(session, 0, 0, 0, 1, 0);
  const auto task = Run(std::move(builder));
  ASSERT_TRUE(First(*task).status.ok());
  EXPECT_EQ(OutAt(*task, 0), 0);
}

TEST_F(EngineStepTest, AppendsWithoutAttending) {
  const auto session = Open();
  TaskBuilder builder(session);
  builder.Add(session, 0, 1, 5, 0, 1);
  const auto task = Run(std::move(builder));
  ASSERT_TRUE(First(*task).status.ok());
  EXPECT_FALSE(First(*task).attended);
  EXPECT_EQ(task->reply.buffer, nullptr);
  EXPECT_EQ(Look(session, 5), 1 + 2 + 3 + 4 + 5);
}

TEST_F(EngineStepTest, ReplaysAnAppliedStepWithoutAppending) {
  const auto session = Open();
  EXPECT_EQ(AppendOnes(session, 0, 4), 4);
  TaskBuilder builder(session);
  builder.Add(session, 0, /*step_id=*/1, 4, 4, 1);
  const auto task = Run(std::move(builder));
  ASSERT_TRUE(First(*task).status.ok()) << First(*task).status;
  EXPECT_TRUE(First(*task).replayed);
  EXPECT_EQ(First(*task).kv_len, 4);
  for (int row = 0; row < 4; ++row) EXPECT_EQ(OutAt(*task, row), row + 1);
}

TEST_F(EngineStepTest, RefusesGapsAndForeignReplaysNamingTheLength) {
  const auto session = Open();
  EXPECT_EQ(AppendOnes(session, 0, 4), 4);
  struct Case {
    int64_t position;
    uint64_t step_id;
    int32_t append_len;
  };
  for (const Case& c : {Case{5, 9, 1}, Case{3, 9, 1}, Case{0, 7, 4}, Case{2, 1, 2}, Case{-1, 1, 1},
                        Case{3, 0, 0}}) {
    TaskBuilder builder(session);
    builder.Add(session, c.position, c.step_id, c.append_len, 1, 1);
    const auto task = Run(std::move(builder));
    EXPECT_TRUE(absl::IsFailedPrecondition(First(*task).status)) << c.position;
    EXPECT_TRUE(absl::StrContains(First(*task).status.message(), "has length 4"))
        << First(*task).status;
    EXPECT_EQ(First(*task).kv_len, 4);
    EXPECT_EQ(OutAt(*task, 0), 0);
    EXPECT_EQ(LseAt(*task, 0), -std::numeric_limits<float>::infinity());
  }
  EXPECT_EQ(Look(session, 4), 4);
}

TEST_F(EngineStepTest, PositionsIncludeTheStart) {
  SessionConfig config = TestConfig(PageFormat::kBf16);
  config.start_position = 1000;
  const auto session = Open(config);
  EXPECT_EQ(AppendOnes(session, 1000, 2), 2);
  EXPECT_EQ(AppendOnes(session, 1002, 1), 3);
  TaskBuilder builder(session);
  builder.Add(session, 3, 9, 1, 1, 1);
  const auto task = Run(std::move(builder));
  EXPECT_TRUE(absl::StrContains(First(*task).status.message(), "has length 1003"))
      << First(*task).status;
}

TEST_F(EngineStepTest, QueriesOfAShardMayComeFromLater) {
  const auto session = Open();
  EXPECT_EQ(AppendOnes(session, 0, 10), 10);
  for (const auto& [position, seen] :
       std::vector<std::pair<int64_t, float>>{{500, 10}, {9, 10}, {3, 4}, {0, 1}, {-5, 0}}) {
    TaskBuilder builder(session);
    builder.Add(session, 10, 0, 0, 1, 0);
    builder->sequences[0].q_position = position;
    const auto task = Run(std::move(builder));
    ASSERT_TRUE(First(*task).status.ok());
    EXPECT_EQ(OutAt(*task, 0), seen) << position;
  }
}

TEST_F(EngineStepTest, OneBadSequenceLeavesItsNeighboursUnharmed) {
  const auto good = Open(), nan = Open(), gap = Open(), late = Open();
  TaskBuilder builder(good);
  builder.Add(good, 0, 1, 2, 1, 1);
  builder.AddFailed(absl::NotFoundError("no such session"), 1, 2);
  builder.Add(nan, 0, 1, 1, 1, std::numeric_limits<float>::quiet_NaN());
  builder.Add(gap, 7, 1, 1, 1, 5);
  builder.Add(late, 0, 1, 3, 1, 100);
  const auto task = Run(std::move(builder));
  const std::vector<SequenceOutcome>& sequences = task->reply.sequences;
  EXPECT_TRUE(task->reply.status.ok());
  EXPECT_TRUE(sequences[0].status.ok());
  EXPECT_TRUE(absl::IsNotFound(sequences[1].status));
  EXPECT_TRUE(absl::IsInvalidArgument(sequences[2].status));
  EXPECT_TRUE(absl::StrContains(sequences[2].status.message(), "sequences[2]"));
  EXPECT_TRUE(absl::IsFailedPrecondition(sequences[3].status));
  EXPECT_TRUE(sequences[4].status.ok());
  EXPECT_EQ(OutAt(*task, 0), 1 + 2);
  for (int row = 1; row < 5; ++row) EXPECT_EQ(OutAt(*task, row), 0) << row;
  EXPECT_EQ(OutAt(*task, 5), 100 + 101 + 102);
  EXPECT_EQ(sequences[2].kv_len, 0);
  EXPECT_EQ(engine().page_stats().pages[0], 2);
  EXPECT_EQ(AppendOnes(nan, 0, 1), 1);
}

TEST_F(EngineStepTest, WhatIsCancelledInTheQueueIsNotDone) {
  const auto session = Open(), neighbour = Open();
  Mailbox<bool> running, go;
  engine().Post([&] {
    running.Put(true);
    go.Take();
  });
  running.Take();
  const auto cancelled = std::make_shared<std::atomic<bool>>(false);
  TaskMailbox first_done, second_done;
  TaskBuilder first(session), second(neighbour);
  first.Add(session, 0, 1, 1, 1, 5);
  first->cancelled = cancelled;
  second.Add(neighbour, 0, 1, 1, 1, 7);
  auto first_task = first.Build(&first_done), second_task = second.Build(&second_done);
  ASSERT_TRUE(engine().Schedule(&first_task).ok());
  ASSERT_TRUE(engine().Schedule(&second_task).ok());
  cancelled->store(true);
  go.Put(true);
  const auto dropped = first_done.Take(), answered = second_done.Take();
  EXPECT_TRUE(absl::IsCancelled(dropped->reply.status)) << dropped->reply.status;
  EXPECT_EQ(First(*dropped).kv_len, 0);
  EXPECT_TRUE(answered->reply.status.ok()) << answered->reply.status;
  EXPECT_EQ(OutAt(*answered, 0), 7);
  EXPECT_EQ(AppendOnes(session, 0, 1), 1) << "the same step, asked again";
}

TEST_F(EngineStepTest, NanInQueriesAppendsNothing) {
  const auto session = Open();
  TaskBuilder builder(session);
  builder.Add(session, 0, 1, 1, 1, 1);
  builder.payload()->q[0] = std::numeric_limits<float>::infinity();
  const auto task = Run(std::move(builder));
  EXPECT_TRUE(absl::IsInvalidArgument(First(*task).status));
  EXPECT_TRUE(absl::StrContains(First(*task).status.message(),
                                "q[0, 0, 0]: inf is not allowed: only finite"));
  EXPECT_EQ(First(*task).kv_len, 0);
  EXPECT_EQ(engine().page_stats().pages[0], 0);
}

TEST_F(EngineStepTest, RefusesMoreTokensThanGranted) {
  SessionConfig config = TestConfig(PageFormat::kBf16);
  config.max_tokens = 10;
  const auto session = Open(config);
  EXPECT_EQ(AppendOnes(session, 0, 10), 10);
  TaskBuilder builder(session);
  builder.Add(session, 10, 20, 1, 0, 1);
  const auto task = Run(std::move(builder));
  EXPECT_TRUE(absl::IsInvalidArgument(First(*task).status));
  EXPECT_TRUE(absl::StrContains(First(*task).status.message(), "max_tokens of 10"));
}

TEST_F(EngineStepTest, ASessionTwiceInAMessageIsRefusedOnce) {
  const auto session = Open();
  TaskBuilder builder(session);
  builder.Add(session, 0, 1, 1, 1, 5).Add(session, 0, 1, 1, 1, 7);
  const auto task = Run(std::move(builder));
  EXPECT_TRUE(task->reply.sequences[0].status.ok());
  EXPECT_TRUE(absl::IsInvalidArgument(task->reply.sequences[1].status));
  EXPECT_EQ(Look(session, 1), 5);
}

TEST_F(EngineStepTest, AFullPoolRefusesWhoDoesNotFitAndUndoesTheirPages) {
  pool_bytes_ = 8 * 32768;  // 16 pages of 16384 bytes; 2 of the 8 slabs are sealing's
  const auto fits = Open(), too_long = Open(), fits_too = Open();
  TaskBuilder builder(fits);
  builder.Add(fits, 0, 1, 64 * 5, 1, 0)
      .Add(too_long, 0, 1, 64 * 8, 1, 0)
      .Add(fits_too, 0, 1, 64, 1, 0);
  FillOnes(&builder);
  const auto task = Run(std::move(builder));
  EXPECT_TRUE(task->reply.sequences[0].status.ok());
  EXPECT_TRUE(absl::IsResourceExhausted(task->reply.sequences[1].status))
      << task->reply.sequences[1].status;
  EXPECT_TRUE(task->reply.sequences[2].status.ok());
  EXPECT_GT(task->reply.retry_after, absl::ZeroDuration());
  EXPECT_EQ(OutAt(*task, 0), 64 * 5);
  EXPECT_EQ(OutAt(*task, 2), 64);
  EXPECT_EQ(engine().page_stats().pages[0], 6);
  EXPECT_EQ(AppendOnes(too_long, 0, 64 * 6), 64 * 6);
}

TEST_F(EngineStepTest, ClosedSessionsAreNotFound) {
  const auto session = Open();
  EXPECT_EQ(AppendOnes(session, 0, 100), 100);
  EXPECT_TRUE(Control([&](SessionControl* control) {
                return control->Close(session->id(), session->epoch(), "tenant-a");
              }).ok());
  EXPECT_EQ(engine().page_stats().total_pages(), 0);
  TaskBuilder builder(session);
  builder.Add(session, 100, 0, 0, 1, 0);
  const auto task = Run(std::move(builder));
  EXPECT_TRUE(absl::IsNotFound(First(*task).status));
}

TEST_F(EngineStepTest, UnsupportedShapesSayWhatIsSupported) {
  SessionConfig config = TestConfig(PageFormat::kBf16);
  config.shape.head_dim = 80;
  const auto session = Open(config);
  TaskBuilder builder(session);
  builder.Add(session, 0, 1, 1, 1, 1);
  const auto task = Run(std::move(builder));
  EXPECT_TRUE(absl::IsUnimplemented(First(*task).status));
  EXPECT_EQ(engine().page_stats().total_pages(), 0);
}

TEST_F(EngineStepTest, ImportsManyLayersInOneTask) {
  const auto session = Open(PageFormat::kBf16, 3);
  const auto import = [&](int64_t position, float value) {
    TaskBuilder builder(session, 1);
    builder.Add(session, position, 0, 4, 0, value);  // layer 1
    builder.payload()->k.resize(2 * 4 * 64, 1.0f);
    builder.payload()->v.resize(2 * 4 * 64, 1.0f);
    for (int i = 0; i < 4; ++i) builder.payload()->k[(4 + i) * 64] = 1000;  // layer 2
    builder->num_layers = 2;
    builder->is_import = true;
    return Run(std::move(builder));
  };
  ASSERT_TRUE(First(*import(0, 1)).status.ok());
  EXPECT_FALSE(First(*import(4, 5)).replayed);
  const auto again = import(4, 77);
  ASSERT_TRUE(First(*again).status.ok()) << First(*again).status;
  EXPECT_TRUE(First(*again).replayed);
  EXPECT_TRUE(absl::IsFailedPrecondition(First(*import(6, 5)).status));
  EXPECT_EQ(Look(session, 0, 0), 0);
  EXPECT_EQ(Look(session, 8, 1), 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8);
  EXPECT_EQ(Look(session, 8, 2), 8000);
}

TEST_F(EngineStepTest, Fp8InputsAreScaledPerHead) {
  const auto session = Open();
  auto codes = std::make_shared<std::vector<uint8_t>>(64, uint8_t{0});
  (*codes)[0] = 0x38;  // 1.0
  TaskBuilder builder(session);
  builder.Add(session, 0, 1, 1, 0, 0);
  std::unique_ptr<AttentionTask> task = builder.Build(&mailbox_);
  for (TensorPieces* tensor : {&task->k, &task->v}) {
    tensor->pieces.clear();
    tensor->type = DType::kF8E4m3;
    tensor->scales = {2.5f};
    tensor->pieces.push_back({reinterpret_cast<const std::byte*>(codes->data()), 64});
  }
  task->payload_owner = codes;
  ASSERT_TRUE(engine().Schedule(&task).ok());
  task = mailbox_.Take();
  ASSERT_TRUE(First(*task).status.ok());
  EXPECT_EQ(Look(session, 1), 2.5f);
}

TEST_F(EngineStepTest, PressureRaisesTheTargetOnlyAsFarAsAllowed) {
  EXPECT_FLOAT_EQ(RaiseTarget(0.05f, 0.2f, 0.4, 0.5), 0.05f);
  EXPECT_FLOAT_EQ(RaiseTarget(0.05f, 0.2f, 0.75, 0.5), 0.1f);
  EXPECT_FLOAT_EQ(RaiseTarget(0.05f, 0.2f, 1, 0.5), 0.2f);
  EXPECT_FLOAT_EQ(RaiseTarget(0.05f, 0, 1, 0.5), 0.05f);
  EXPECT_FLOAT_EQ(RaiseTarget(0.05f, 0.2f, 1, 1), 0.05f);
}

TEST_F(EngineStepTest, ALostDeviceFailsTheQueueAndTellsMain) {
  const auto session = Open();
  backend().set_run_status(absl::UnavailableError("device lost"));
  TaskBuilder builder(session);
  builder.Add(session, 0, 1, 1, 1, 1);
  const auto task = Run(std::move(builder));
  EXPECT_TRUE(absl::IsUnavailable(task->reply.status));
  EXPECT_TRUE(absl::IsUnavailable(lost_.Take()));
  TaskBuilder later(session);
  later.Add(session, 0, 1, 1, 1, 1);
  EXPECT_TRUE(absl::IsUnavailable(Run(std::move(later))->reply.status));
}

TEST_F(EngineStepTest, StopAnswersWhatIsQueued) {
  const auto session = Open();
  EXPECT_EQ(AppendOnes(session, 0, 1), 1);
  TaskMailbox first, second;
  Mailbox<bool> entered, go;
  ASSERT_TRUE(engine().Post([&] {
    entered.Put(true);
    go.Take();
  }));
  entered.Take();
  auto task = TaskBuilder(session).Add(session, 1, 2, 1, 1, 1).Build(&first);
  ASSERT_TRUE(engine().Schedule(&task).ok());
  std::thread stopper([&] { engine().Stop(absl::InfiniteFuture()); });
  go.Put(true);
  stopper.join();
  EXPECT_TRUE(first.Take()->reply.sequences[0].status.ok());
  task = TaskBuilder(session).Add(session, 2, 3, 1, 1, 1).Build(&second);
  EXPECT_TRUE(absl::IsUnavailable(engine().Schedule(&task)));
}

TEST_F(EngineStepTest, StopPastItsDeadlineFailsWhatIsQueued) {
  const auto session = Open();
  TaskMailbox answer;
  Mailbox<bool> entered, go;
  ASSERT_TRUE(engine().Post([&] {
    entered.Put(true);
    go.Take();
  }));
  entered.Take();
  auto task = TaskBuilder(session).Add(session, 0, 1, 1, 1, 1).Build(&answer);
  ASSERT_TRUE(engine().Schedule(&task).ok());
  std::thread stopper([&] { engine().Stop(absl::InfinitePast()); });
  // The engine cannot take the task before the deadline is set: then Schedule says so, and no
  // longer that its queue is full of probes.
  while (true) {
    auto probe = TaskBuilder(session).Add(session, 0, 1, 0, 1, 1).Build(nullptr);
    if (absl::IsUnavailable(engine().Schedule(&probe))) break;
    std::this_thread::yield();
  }
  go.Put(true);
  stopper.join();
  EXPECT_TRUE(absl::IsUnavailable(answer.Take()->reply.status));
}

TEST_F(EngineStepTest, ADeadlinePassedInTheQueueDoesNothing) {
  const auto session = Open();
  TaskMailbox answer;
  Mailbox<bool> entered, go;
  ASSERT_TRUE(engine().Post([&] {
    entered.Put(true);
    go.Take();
  }));
  entered.Take();
  auto task = TaskBuilder(session).Add(session, 0, 1, 1, 1, 1).Build(&answer);
  task->deadline = clock_.Now() + absl::Seconds(1);
  ASSERT_TRUE(engine().Schedule(&task).ok());
  clock_.Advance(absl::Seconds(1));
  go.Put(true);
  EXPECT_TRUE(absl::IsDeadlineExceeded(answer.Take()->reply.status));
  EXPECT_EQ(Look(session, 0), 0);
}

TEST_F(EngineStepTest, ReportsEachBatch) {
  const auto good = Open(), gap = Open();
  TaskBuilder builder(good);
  builder.Add(good, 0, 1, 3, 2, 1).Add(gap, 9, 1, 1, 1, 1);
  Run(std::move(builder));
  engine().Quiesce();
  EXPECT_EQ(observer_.batches, 1);
  EXPECT_EQ(observer_.q_tokens, 2);
  EXPECT_EQ(observer_.appended_tokens, 3);
  EXPECT_EQ(observer_.codes, (std::vector<absl::StatusCode>{
                                 absl::StatusCode::kOk, absl::StatusCode::kFailedPrecondition}));
  EXPECT_EQ(observer_.gauges.sessions, 2);
  EXPECT_EQ(observer_.gauges.pages.pages[0], 1);
}

}  // namespace
}  // namespace adaattn

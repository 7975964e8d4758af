// The engine over the real CPU backend: what comes out is attention, whatever happened to the
// session's pages on the way.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "kernels/reference/attention_f64.h"
#include "server/clock.h"
#include "tests/unit/engine_harness.h"

namespace adaattn {
namespace {

constexpr int32_t kQHeads = 4, kKvHeads = 2, kHeadDim = 64;
constexpr int32_t kKvRow = kKvHeads * kHeadDim, kQRow = kQHeads * kHeadDim;

// Keys that a few directions explain, with an offset, as real ones; values and queries at random.
struct History {
  std::vector<float> q, k, v;

  History(int32_t tokens, uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> directions(6 * kKvRow), offset(kKvRow);
    for (float& x : directions) x = normal(random);
    for (float& x : offset) x = 3 * normal(random);
    for (int32_t t = 0; t < tokens; ++t) {
      float weights[6];
      for (float& w : weights) w = normal(random);
      for (int32_t c = 0; c < kKvRow; ++c) {
        float key = offset[c] + 0.1f * normal(random);
        for (int32_t i = 0; i < 6; ++i) key += weights[i] * directions[i * kKvRow + c];
        k.push_back(key);
        v.push_back(normal(random));
      }
      for (int32_t c = 0; c < kQRow; ++c) q.push_back(normal(random));
    }
  }
};

class AuditObserver final : public EngineObserver {
 public:
  void OnAudit(const AuditReport& report) override {
    for (const float error : report.actual) actual.push_back(error);
  }
  void OnSeal(const SealReport& report) override { sealed += report.pages_sealed; }
  std::vector<float> actual;
  int64_t sealed = 0;
};

class EngineCpuTest : public testing::Test {
 protected:
  EngineCpuTest() : table_(TableOptions(), SystemClock::Get()) {
    BackendOptions backend;
    backend.pool_bytes = int64_t{64} << 20;
    backend.exact_tier_bytes = int64_t{16} << 20;
    backend.num_threads = 2;
    backend_ = *CreateCpuBackend(backend);
    EngineOptions options;
    options.batcher.max_batch_q_bytes = int64_t{4} << 20;
    options.batcher.max_batch_kv_bytes = int64_t{4} << 20;
    options.audit_share = 0.5;
    engine_ =
        std::make_unique<Engine>(options, backend_.get(), &table_, &observer_, SystemClock::Get());
    EXPECT_TRUE(engine_->Start([](const absl::Status&) {}).ok());
  }
  void TearDown() override {
    engine_->Stop(absl::InfiniteFuture());
    EXPECT_EQ(engine_->page_stats().total_pages(), 0) << "pages leaked";
  }

  static SessionTableOptions TableOptions() {
    SessionTableOptions options;
    options.instance = "test";
    return options;
  }
  std::shared_ptr<Session> Open(PageFormat format, ExactTier exact_tier = ExactTier::kNone) {
    SessionConfig config = TestConfig(format);
    config.shape = {kQHeads, kKvHeads, kHeadDim};
    config.exact_tier = exact_tier;
    return *table_.Open(config);
  }

  // Appends tokens [begin, end) of `history` and attends with the last one's q.
  std::unique_ptr<AttentionTask> Step(const std::shared_ptr<Session>& session,
                                      const History& history, int32_t begin, int32_t end,
                                      const AttendOptions& attend_options = {}) {
    TaskBuilder builder(session);
    builder.Add(session, begin, static_cast<uint64_t>(end), end - begin, 1, 0);
    builder->options = attend_options;
    TestPayload* const payload = builder.payload();
    payload->k.assign(history.k.begin() + begin * kKvRow, history.k.begin() + end * kKvRow);
    payload->v.assign(history.v.begin() + begin * kKvRow, history.v.begin() + end * kKvRow);
    payload->q.assign(history.q.begin() + (end - 1) * kQRow, history.q.begin() + end * kQRow);
    std::unique_ptr<AttentionTask> task = builder.Build(&mailbox_);
    EXPECT_TRUE(engine_->Schedule(&task).ok());
    task = mailbox_.Take();
    EXPECT_TRUE(task->reply.sequences[0].status.ok()) << task->reply.sequences[0].status;
    return task;
  }
  // Attends the first `length` tokens of `history` again, with the last one's q.
  std::unique_ptr<AttentionTask> Look(const std::shared_ptr<Session>& session,
                                      const History& history, int32_t length, AttendMode mode) {
    AttendOptions attend_options;
    attend_options.mode = mode;
    return Look(session, history, length, attend_options);
  }
  std::unique_ptr<AttentionTask> Look(const std::shared_ptr<Session>& session,
                                      const History& history, int32_t length,
                                      const AttendOptions& attend_options) {
    TaskBuilder builder(session);
    builder.Add(session, length, 0, 0, 1, 0);
    builder->options = attend_options;
    builder.payload()->q.assign(history.q.begin() + (length - 1) * kQRow,
                                history.q.begin() + length * kQRow);
    std::unique_ptr<AttentionTask> task = builder.Build(&mailbox_);
    EXPECT_TRUE(engine_->Schedule(&task).ok());
    task = mailbox_.Take();
    EXPECT_TRUE(task->reply.sequences[0].status.ok()) << task->reply.sequences[0].status;
    return task;
  }

  // Relative L2 error of the task's one row against float64 over the history's first tokens.
  static double Error(const AttentionTask& task, const History& history, int32_t length) {
    AttentionF64Params params;
    params.shape = {kQHeads, kKvHeads, kHeadDim};
    params.kv_len = length;
    params.q_len = 1;
    params.q_start = length - 1;
    params.softmax_scale = 0.125;
    const AttentionF64Result truth = AttentionF64(params, history.q.data() + (length - 1) * kQRow,
                                                  history.k.data(), history.v.data());
    double gap = 0, norm = 0;
    for (int32_t c = 0; c < kQRow; ++c) {
      float out;
      std::memcpy(&out, task.reply.buffer->bytes.get() + c * sizeof(float), sizeof(out));
      gap += (out - truth.out[c]) * (out - truth.out[c]);
      norm += truth.out[c] * truth.out[c];
    }
    return std::sqrt(gap / norm);
  }

  template <typename Work>
  void Control(Work work) {
    Mailbox<bool> done;
    ASSERT_TRUE(engine_->Post([&] {
      work(engine_->control());
      done.Put(true);
    }));
    done.Take();
  }

  AuditObserver observer_;
  SessionTable table_;
  TaskMailbox mailbox_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Engine> engine_;
};

TEST_F(EngineCpuTest, DenseSessionsAreExactToTheirType) {
  const History history(300, 1);
  for (const auto& [format, limit] : std::vector<std::pair<PageFormat, double>>{
           {PageFormat::kF32, 1e-5}, {PageFormat::kF16, 2e-3}, {PageFormat::kBf16, 2e-2}}) {
    const auto session = Open(format);
    Step(session, history, 0, 250);
    const auto task = Step(session, history, 250, 300);
    EXPECT_LT(Error(*task, history, 300), limit) << PageFormatName(format);
  }
}

TEST_F(EngineCpuTest, SealedSessionsStayCloseAndReadLess) {
  const History history(2048, 2);
  const auto session = Open(PageFormat::kProgressive);
  Step(session, history, 0, 2000);
  engine_->Quiesce();
  EXPECT_EQ(observer_.sealed, 30);
  Step(session, history, 2000, 2001);
  const auto full = Look(session, history, 2001, AttendMode::kFullDepth);
  EXPECT_LT(Error(*full, history, 2001), 0.03);
  EXPECT_EQ(full->reply.sequences[0].decision.mean_key_bits, 8);
  EXPECT_EQ(full->reply.sequences[0].decision.pages_sealed, 30 * kKvHeads);
  AttendOptions ladder;
  ladder.policy = Policy::kThreshold;
  ladder.theta = 0.004f;
  const auto less = Look(session, history, 2001, ladder);
  EXPECT_LT(Error(*less, history, 2001), 0.1);
  EXPECT_LT(less->reply.sequences[0].decision.bytes_read,
            full->reply.sequences[0].decision.bytes_read * 3 / 4);
  EXPECT_EQ(less->reply.sequences[0].decision.bytes_bf16, int64_t{2001} * kKvHeads * 64 * 4);
}

TEST_F(EngineCpuTest, TheExactTierIsExactBesideSealedPages) {
  const History history(1500, 3);
  const auto session = Open(PageFormat::kProgressive, ExactTier::kPool);
  Step(session, history, 0, 1500);
  engine_->Quiesce();
  EXPECT_GT(observer_.sealed, 0);
  const auto task = Look(session, history, 1500, AttendMode::kExact);
  EXPECT_LT(Error(*task, history, 1500), 2e-2);
  EXPECT_EQ(task->reply.sequences[0].decision.pages_sealed, 0);
}

TEST_F(EngineCpuTest, BothTiersAnswerExactlyAlike) {
  const History history(1500, 3);
  const auto in_pool = Open(PageFormat::kProgressive, ExactTier::kPool);
  const auto in_host = Open(PageFormat::kProgressive, ExactTier::kHost);
  const auto dense = Open(PageFormat::kBf16);
  for (const auto& session : {in_pool, in_host, dense}) {
    Step(session, history, 0, 1500);
    engine_->Quiesce();
  }
  EXPECT_GT(engine_->page_stats().pages[3], 0);
  const auto want = Look(dense, history, 1500, AttendMode::kExact);
  for (const auto& session : {in_pool, in_host}) {
    const auto task = Look(session, history, 1500, AttendMode::kExact);
    EXPECT_EQ(std::memcmp(task->reply.buffer->bytes.get(), want->reply.buffer->bytes.get(),
                          static_cast<size_t>(want->reply.buffer->out_bytes)),
              0);
  }
}

TEST_F(EngineCpuTest, DeterministicKeepsItsPromise) {
  const History history(1500, 3);
  const auto session = Open(PageFormat::kProgressive, ExactTier::kHost);
  const auto dense = Open(PageFormat::kBf16);
  Step(session, history, 0, 1500);
  Step(dense, history, 0, 1500);
  engine_->Quiesce();
  const auto truth = Look(dense, history, 1500, AttendMode::kExact);
  const auto* const want = reinterpret_cast<const float*>(truth->reply.buffer->bytes.get());
  for (const float target : {0.5f, 0.05f}) {
    AttendOptions options;
    options.mode = AttendMode::kDeterministic;
    options.target_relative_error = target;
    const auto task = Look(session, history, 1500, options);
    ASSERT_TRUE(task->reply.sequences[0].status.ok()) << task->reply.sequences[0].status;
    const DecisionSummary& decision = task->reply.sequences[0].decision;
    EXPECT_GT(decision.error_bound, 0);
    EXPECT_LE(decision.error_bound, target);
    EXPECT_EQ(decision.effective_target, target);
    EXPECT_EQ(decision.predicted_error, 0);
    EXPECT_GT(decision.lse_above, 0);
    const auto* const out = reinterpret_cast<const float*>(task->reply.buffer->bytes.get());
    for (int32_t head = 0; head < kQHeads; ++head) {
      double error = 0, norm = 0;
      for (int32_t c = 0; c < kHeadDim; ++c) {
        error += std::pow(out[head * kHeadDim + c] - want[head * kHeadDim + c], 2);
        norm += std::pow(want[head * kHeadDim + c], 2);
      }
      EXPECT_LE(std::sqrt(error / norm), decision.error_bound) << head;
    }
  }
}

TEST_F(EngineCpuTest, TruncatesIntoSealedPagesAndGoesOn) {
  const History history(1600, 4);
  const auto session = Open(PageFormat::kProgressive);
  Step(session, history, 0, 1500);
  engine_->Quiesce();
  Control([&](SessionControl* control) {
    const auto result = control->Truncate(session.get(), 1130);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->pages_reopened, 1);
  });
  EXPECT_LT(Error(*Look(session, history, 1130, AttendMode::kFullDepth), history, 1130), 0.04);
  const auto task = Step(session, history, 1130, 1600);
  engine_->Quiesce();
  EXPECT_EQ(task->reply.sequences[0].kv_len, 1600);
  EXPECT_LT(Error(*Look(session, history, 1600, AttendMode::kFullDepth), history, 1600), 0.04);
}

TEST_F(EngineCpuTest, BranchesDivergeFromTheirPrefix) {
  const History history(1400, 5);
  History other = history;
  const History tail(100, 6);
  std::copy(tail.k.begin(), tail.k.end(), other.k.begin() + 1300 * kKvRow);
  std::copy(tail.v.begin(), tail.v.end(), other.v.begin() + 1300 * kKvRow);
  const auto session = Open(PageFormat::kProgressive);
  Step(session, history, 0, 1300);
  engine_->Quiesce();
  std::shared_ptr<Session> branch;
  Control([&](SessionControl* control) { branch = control->Fork(*session, 1)->front(); });
  Step(branch, other, 1300, 1400);
  Step(session, history, 1300, 1400);
  engine_->Quiesce();
  EXPECT_LT(Error(*Look(session, history, 1400, AttendMode::kFullDepth), history, 1400), 0.04);
  EXPECT_LT(Error(*Look(branch, other, 1400, AttendMode::kFullDepth), other, 1400), 0.04);
}

TEST_F(EngineCpuTest, NonFiniteKeysAppendNothing) {
  History history(80, 7);
  const auto session = Open(PageFormat::kBf16);
  Step(session, history, 0, 70);
  TaskBuilder builder(session);
  builder.Add(session, 70, 99, 1, 1, std::numeric_limits<float>::infinity());
  builder.payload()->k.resize(kKvRow, 1.0f);
  std::unique_ptr<AttentionTask> task = builder.Build(&mailbox_);
  ASSERT_TRUE(engine_->Schedule(&task).ok());
  task = mailbox_.Take();
  EXPECT_TRUE(absl::IsInvalidArgument(task->reply.sequences[0].status));
  EXPECT_EQ(task->reply.sequences[0].kv_len, 70);
  EXPECT_LT(Error(*Step(session, history, 70, 80), history, 80), 2e-2);
}

TEST_F(EngineCpuTest, AuditsMeasureWhatWasLeftUnread) {
  const History history(2048, 8);
  const auto session = Open(PageFormat::kProgressive);
  Step(session, history, 0, 2048);
  engine_->Quiesce();
  observer_.actual.clear();
  for (int i = 0; i < 4; ++i) Look(session, history, 2048, AttendMode::kStatistical);
  engine_->Quiesce();
  ASSERT_EQ(observer_.actual.size(), 2u * kKvHeads);
  for (const float error : observer_.actual) EXPECT_LT(error, 0.15);
}

TEST_F(EngineCpuTest, ManySessionsInOneMessageAgreeWithEachAlone) {
  const History history(200, 9);
  std::vector<std::shared_ptr<Session>> sessions;
  for (int i = 0; i < 8; ++i) {
    sessions.push_back(Open(PageFormat::kF32));
    Step(sessions.back(), history, 0, 100 + i);
  }
  TaskBuilder builder(sessions[0]);
  for (int i = 0; i < 8; ++i) builder.Add(sessions[i], 100 + i, 0, 0, 1, 0);
  builder.payload()->q.clear();
  for (int i = 0; i < 8; ++i) {
    builder.payload()->q.insert(builder.payload()->q.end(), history.q.begin() + (99 + i) * kQRow,
                                history.q.begin() + (100 + i) * kQRow);
  }
  std::unique_ptr<AttentionTask> task = builder.Build(&mailbox_);
  ASSERT_TRUE(engine_->Schedule(&task).ok());
  task = mailbox_.Take();
  for (int i = 0; i < 8; ++i) {
    ASSERT_TRUE(task->reply.sequences[i].status.ok());
    const auto alone = Look(sessions[i], history, 100 + i, AttendMode::kExact);
    EXPECT_EQ(std::memcmp(task->reply.buffer->bytes.get() + i * kQRow * sizeof(float),
                          alone->reply.buffer->bytes.get(), kQRow * sizeof(float)),
              0)
        << i;
  }
}

}  // namespace
}  // namespace adaattn

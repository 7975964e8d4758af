#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <thread>

#include "tests/unit/engine_fixture.h"

namespace adaattn {
namespace {

class EngineStressTest : public EngineFixture {
 protected:
  // One client: steps of its own session, with truncations, branches and refusals in between. What
  // every row sees must be the number of tokens that the client knows of.
  void RunClient(uint32_t seed) {
    std::mt19937 random(seed);
    const auto session = Open(seed % 2 == 0 ? PageFormat::kProgressive : PageFormat::kBf16);
    TaskMailbox mailbox;
    int64_t length = 0;
    for (uint64_t step = 1; step <= 150; ++step) {
      const auto count = static_cast<int32_t>(1 + random() % 20);
      TaskBuilder builder(session);
      builder.Add(session, length, step, count, 1, 1);
      FillOnes(&builder);
      std::unique_ptr<AttentionTask> task = builder.Build(&mailbox);
      ASSERT_TRUE(engine_->Schedule(&task).ok());
      task = mailbox.Take();
      ASSERT_TRUE(task->reply.sequences[0].status.ok()) << task->reply.sequences[0].status;
      length += count;
      ASSERT_EQ(OutAt(*task, 0), static_cast<float>(length));
      if (random() % 8 == 0) {
        const auto keep = static_cast<int64_t>(random() % (length + 1));
        ASSERT_TRUE(InEngine(
            [&](SessionControl* control) { return control->Truncate(session.get(), keep).ok(); }));
        length = keep;
      }
      if (random() % 8 == 0) Branch(session, length, step);
    }
    ASSERT_TRUE(InEngine([&](SessionControl* control) {
      return control->Close(session->id(), session->epoch(), "tenant-a").ok();
    }));
    closed_ += 1;
  }
  // Forks, writes to the branch, closes it: the parent must not notice.
  void Branch(const std::shared_ptr<Session>& session, int64_t length, uint64_t step) {
    std::shared_ptr<Session> branch;
    ASSERT_TRUE(InEngine([&](SessionControl* control) {
      auto branches = control->Fork(*session, 1);
      if (branches.ok()) branch = branches->front();
      return branches.ok();
    }));
    TaskMailbox mailbox;
    TaskBuilder builder(branch);
    builder.Add(branch, length, step + 1000, 3, 1, 7000);
    std::unique_ptr<AttentionTask> task = builder.Build(&mailbox);
    ASSERT_TRUE(engine_->Schedule(&task).ok());
    task = mailbox.Take();
    ASSERT_EQ(OutAt(*task, 0), static_cast<float>(length + 7000 + 7001 + 7002));
    ASSERT_TRUE(InEngine([&](SessionControl* control) {
      return control->Close(branch->id(), branch->epoch(), "tenant-a").ok();
    }));
  }
  template <typename Work>
  bool InEngine(Work work) {
    Mailbox<bool> result;
    EXPECT_TRUE(engine_->Post([&] { result.Put(work(engine_->control())); }));
    return result.Take();
  }

  std::atomic<int> closed_{0};
};

TEST_F(EngineStressTest, ConcurrentClientsEachSeeTheirOwnTokens) {
  pool_bytes_ = int64_t{16} << 20;
  options_.audit_share = 0.1;
  engine();
  std::vector<std::thread> clients;
  for (uint32_t seed = 0; seed < 4; ++seed) {
    clients.emplace_back([this, seed] { RunClient(seed); });
  }
  for (std::thread& client : clients) client.join();
  engine().Quiesce();
  EXPECT_EQ(closed_, 4);
  EXPECT_EQ(engine().page_stats().total_pages(), 0);
  EXPECT_EQ(table_.size(), 0);
}

TEST_F(EngineStressTest, StopsWhileClientsStillSend) {
  engine();
  std::atomic<int64_t> answered{0}, scheduled{0};
  std::atomic<bool> stopped{false};
  constexpr int kClients = 3;
  std::vector<std::thread> clients;
  clients.reserve(kClients);
  for (int i = 0; i < kClients; ++i) {
    clients.emplace_back([&] {
      const auto session = Open();
      while (!stopped) {
        auto task = TaskBuilder(session).Add(session, 0, 0, 0, 1, 0).Build(nullptr);
        task->done = [&](std::unique_ptr<AttentionTask>) { ++answered; };
        scheduled += engine_->Schedule(&task).ok() ? 1 : 0;
      }
    });
  }
  while (answered < 100) std::this_thread::yield();
  engine().Stop(absl::InfiniteFuture());
  stopped = true;
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(answered, scheduled);
  EXPECT_EQ(engine().load().tasks, 0);
}

}  // namespace
}  // namespace adaattn

// Callers that leave, and a device that is lost.

#include <fstream>
#include <thread>

#include "absl/time/clock.h"
#include "server/serve.h"
#include "tests/integration/server_fixture.h"
#include "tests/support/health_watch.h"
#include "tests/unit/fake_backend.h"

namespace adaattn {
namespace {

class CancelTest : public ServerFixture {
 protected:
  // Sends `request` while the engine is held and takes it back: true once the server says that it
  // dropped it. The word of a cancel may come after the engine is let go; then the step was done.
  bool DroppedInQueue(const v1::AttendRequest& request) {
    const std::string metric = "adaattn_requests_total{code=\"CANCELLED\",method=\"Attend\"}";
    const double before = Samples()[metric];
    grpc::ClientContext context;
    v1::AttendResponse response;
    std::thread caller;
    {
      const EngineHold hold(server_->engine());
      caller = std::thread([&] {
        EXPECT_EQ(stub_->Attend(&context, request, &response).error_code(),
                  grpc::StatusCode::CANCELLED);
      });
      while (server_->engine()->load().tasks == 0) std::this_thread::yield();
      context.TryCancel();
      caller.join();
      // Behind the cancel on the same connection.
      for (int i = 0; i < 20; ++i) {
        grpc::ClientContext behind;
        v1::GetServerInfoResponse info;
        EXPECT_TRUE(stub_->GetServerInfo(&behind, {}, &info).ok());
      }
    }
    server_->engine()->Quiesce();
    return Samples()[metric] > before;
  }
};

TEST_F(CancelTest, ACancelledCallLeavesTheQueueUndone) {
  const v1::SessionRef session = Open(v1::PAGE_FORMAT_BF16);
  constexpr int kRounds = 50;
  int64_t length = 0;
  bool dropped = false;
  for (int round = 0; round < kRounds && !dropped; ++round) {
    const auto step_id = static_cast<uint64_t>(round) + 1;
    dropped = DroppedInQueue(StepRequest(session, length, step_id, 1));
    if (!dropped) ++length;
  }
  ASSERT_TRUE(dropped);
  v1::AttendResponse response;
  ASSERT_TRUE(Attend(StepRequest(session, length, 1000, 1), &response).ok());
  EXPECT_EQ(response.sequences(0).code(), 0) << response.sequences(0).message();
  EXPECT_EQ(response.sequences(0).kv_len(), length + 1);
}

class WaitSealedTest : public ServerFixture {
 protected:
  static constexpr int64_t kTokens = 1536;

  int64_t PagesSealed() {
    grpc::ClientContext context;
    v1::ListSessionsResponse list;
    EXPECT_TRUE(stub_->ListSessions(&context, {}, &list).ok());
    return list.sessions_size() == 1 ? list.sessions(0).pages_sealed() : -1;
  }
};

TEST_F(WaitSealedTest, AnImportCanWaitUntilEveryDuePageIsSealed) {
  const v1::SessionRef session = Open(v1::PAGE_FORMAT_PROGRESSIVE);
  v1::ImportKvRequest chunk = Chunk(session, 0, kTokens, RandomFloats(kTokens * kKvRow, 1),
                                    RandomFloats(kTokens * kKvRow, 2));
  chunk.set_wait_sealed(true);
  v1::ImportKvResponse response;
  const grpc::Status status = Import({chunk}, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.kv_len(0), kTokens);
  EXPECT_EQ(PagesSealed(), kLayers * (kTokens / kPageTokens - 1));
}

TEST_F(WaitSealedTest, AMessageWithoutTokensOnlyWaits) {
  const v1::SessionRef session = Open(v1::PAGE_FORMAT_PROGRESSIVE);
  ImportTokens(session, kTokens, RandomFloats(kTokens * kKvRow, 1),
               RandomFloats(kTokens * kKvRow, 2));
  v1::ImportKvRequest wait;
  wait.set_session_id(session.session_id());
  wait.set_epoch(session.epoch());
  wait.set_wait_sealed(true);
  v1::ImportKvResponse response;
  const grpc::Status status = Import({wait}, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.kv_len(0), kTokens);
  EXPECT_EQ(PagesSealed(), kLayers * (kTokens / kPageTokens - 1));
  wait.set_wait_sealed(false);
  EXPECT_EQ(Import({wait}, &response).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

std::unique_ptr<FakeBackend> LostBackend() {
  auto backend = std::make_unique<FakeBackend>(int64_t{16} << 20);
  backend->set_run_status(absl::UnavailableError("the device fell off the bus"));
  return backend;
}

class LostDeviceTest : public ServerFixture {
 protected:
  void SetUp() override {
    auto server = Server::Start(Options(), LostBackend());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = std::move(*server);
    stub_ = v1::Attention::NewStub(Channel(server_->addresses().grpc));
  }
};

TEST_F(LostDeviceTest, FailsTheQueueAndTurnsHealthOff) {
  HealthWatch health(Channel(server_->addresses().grpc), "adaattn.v1.Attention");
  EXPECT_EQ(health.Next(), HealthWatch::kServing);
  constexpr int kCallers = 3;
  std::vector<v1::SessionRef> sessions;
  sessions.reserve(kCallers);
  for (int i = 0; i < kCallers; ++i) sessions.push_back(Open(v1::PAGE_FORMAT_BF16));
  std::vector<std::thread> callers;
  {
    const EngineHold hold(server_->engine());
    for (const v1::SessionRef& session : sessions) {
      callers.emplace_back([this, session] {
        v1::AttendResponse response;
        const grpc::Status status = Attend(StepRequest(session, 0, 1, 1), &response);
        EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE) << status.error_message();
      });
    }
    while (server_->engine()->load().tasks < kCallers) std::this_thread::yield();
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(health.Next(), HealthWatch::kNotServing);
  EXPECT_TRUE(server_->device_lost());
  v1::SessionRef session;
  EXPECT_EQ(TryOpen(OpenRequest(v1::PAGE_FORMAT_BF16), &session).error_code(),
            grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(Samples()["adaattn_ready"], 0);
}

// What adaattn-server does with its process; ends it with Serve's exit code.
[[noreturn]] void ServeUntilLost(ServerOptions options) {
  const TempDir dir;
  options.unix_socket = dir.File("grpc.sock");
  options.port_file = dir.File("ports");
  std::thread caller([&options] {
    while (!std::ifstream(options.port_file).good()) absl::SleepFor(absl::Milliseconds(1));
    const auto stub = v1::Attention::NewStub(
        grpc::CreateChannel("unix:" + options.unix_socket, grpc::InsecureChannelCredentials()));
    grpc::ClientContext open_context, attend_context;
    v1::OpenSessionRequest open;
    open.mutable_model()->set_num_layers(1);
    open.mutable_model()->set_num_q_heads(1);
    open.mutable_model()->set_num_kv_heads(1);
    open.mutable_model()->set_head_dim(64);
    v1::OpenSessionResponse session;
    if (!stub->OpenSession(&open_context, open, &session).ok()) std::_Exit(40);
    v1::AttendRequest request;
    v1::SequenceInput* sequence = request.add_sequences();
    sequence->set_session_id(session.session_id());
    sequence->set_epoch(session.epoch());
    sequence->set_step_id(1);
    sequence->set_append_len(1);
    *request.mutable_k() = F32Tensor(Floats(64, 1.0f), {1, 1, 64});
    *request.mutable_v() = F32Tensor(Floats(64, 1.0f), {1, 1, 64});
    v1::AttendResponse response;
    const grpc::Status status = stub->Attend(&attend_context, request, &response);
    if (status.error_code() != grpc::StatusCode::UNAVAILABLE) std::_Exit(41);
  });
  const int code = Serve(options, LostBackend());
  caller.join();
  std::_Exit(code);
}

TEST(LostDeviceDeathTest, TheProcessLeavesWithANonZeroStatus) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  ServerOptions options;
  options.listen.clear();
  options.metrics_listen.clear();
  options.engine.batcher.max_batch_q_bytes = int64_t{1} << 20;
  options.engine.batcher.max_batch_kv_bytes = int64_t{1} << 20;
  EXPECT_EXIT(ServeUntilLost(options), ::testing::ExitedWithCode(1), "device lost");
}

}  // namespace
}  // namespace adaattn

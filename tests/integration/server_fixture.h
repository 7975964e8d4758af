#ifndef ADAATTN_TESTS_INTEGRATION_SERVER_FIXTURE_H_
#define ADAATTN_TESTS_INTEGRATION_SERVER_FIXTURE_H_

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "adaattn/v1/attention.grpc.pb.h"
#include "kernels/reference/attention_f64.h"
#include "server/server.h"
#include "tests/support/exposition.h"
#include "tests/support/http_get.h"
#include "tests/support/test_backend.h"

namespace adaattn {

using Floats = std::vector<float>;

// A directory of this process and test, gone with the object.
class TempDir {
 public:
  TempDir() {
    static int count = 0;
    path_ = std::filesystem::temp_directory_path() /
            ("adaattn_" + std::to_string(getpid()) + "_" + std::to_string(++count));
    std::filesystem::create_directories(path_);
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  std::string File(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

inline Floats RandomFloats(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Floats floats(static_cast<size_t>(count));
  for (float& value : floats) value = normal(random);
  return floats;
}

inline v1::Tensor F32Tensor(const Floats& values, std::initializer_list<int64_t> shape) {
  v1::Tensor tensor;
  tensor.set_dtype(v1::DATA_TYPE_FP32);
  for (const int64_t size : shape) tensor.add_shape(size);
  tensor.set_data(values.data(), values.size() * sizeof(float));
  return tensor;
}

inline Floats ReadF32(const v1::Tensor& tensor) {
  Floats values(tensor.data().size() / sizeof(float));
  std::memcpy(values.data(), tensor.data().data(), values.size() * sizeof(float));
  return values;
}

inline double RelativeError(const Floats& actual, const std::vector<double>& expected) {
  EXPECT_EQ(actual.size(), expected.size());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < std::min(actual.size(), expected.size()); ++i) {
    difference += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / norm);
}

// A server in this process, with the backend that ADAATTN_TEST_BACKEND names, reached over real
// sockets. Every test ends with all sessions closed and must leave no page behind.
class ServerFixture : public ::testing::Test {
 protected:
  static constexpr int kLayers = 2, kQHeads = 4, kKvHeads = 2, kDim = 64;
  static constexpr int kQRow = kQHeads * kDim, kKvRow = kKvHeads * kDim;

  virtual ServerOptions Options() const {
    ServerOptions options;
    options.listen = "127.0.0.1:0";
    options.metrics_listen = "127.0.0.1:0";
    options.unix_socket = dir_.File("grpc.sock");
    options.backend = TestBackend();
    options.engine.seal.min_tokens = 0;  // whatever the device's tuning
    options.device.pool_bytes = int64_t{48} << 20;
    options.device.num_threads = 2;
    options.engine.audit_share = 0;
    options.engine.batcher.max_batch_q_bytes = int64_t{4} << 20;
    options.engine.batcher.max_batch_kv_bytes = int64_t{4} << 20;
    return options;
  }

  void SetUp() override {
    auto server = Server::Start(Options());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = std::move(*server);
    stub_ = v1::Attention::NewStub(Channel(server_->addresses().grpc));
  }

  void TearDown() override {
    if (server_ == nullptr) return;
    // By way of the service, page by page of the list.
    while (true) {
      grpc::ClientContext context;
      v1::ListSessionsResponse list;
      ASSERT_TRUE(stub_->ListSessions(&context, {}, &list).ok());
      if (list.sessions().empty()) break;
      for (const v1::SessionSummary& summary : list.sessions()) {
        grpc::ClientContext close_context;
        v1::CloseSessionRequest request;
        request.mutable_session()->set_session_id(summary.session_id());
        request.mutable_session()->set_epoch(summary.epoch());
        v1::CloseSessionResponse response;
        ASSERT_TRUE(stub_->CloseSession(&close_context, request, &response).ok());
      }
    }
    EXPECT_EQ(PagesInUse(), 0) << "pages leaked";
    server_->Drain(absl::Now() + absl::Seconds(10), [] { return false; });
  }

  static std::shared_ptr<grpc::Channel> Channel(const std::string& target) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(-1);
    // A channel of its own, also for the same target.
    static std::atomic<int> count{0};
    arguments.SetInt("adaattn.test.channel", ++count);
    return grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
  }

  int64_t PagesInUse() {
    server_->engine()->Quiesce();
    return server_->engine()->page_stats().total_pages();
  }

  // What the server says of itself; whatever depends on its backend is asked here.
  v1::GetServerInfoResponse Info() {
    grpc::ClientContext context;
    v1::GetServerInfoResponse info;
    const grpc::Status status = stub_->GetServerInfo(&context, {}, &info);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return info;
  }
  bool Offers(v1::Policy policy) {
    const v1::GetServerInfoResponse info = Info();
    return std::count(info.policies().begin(), info.policies().end(), policy) > 0;
  }
  bool Offers(v1::Mode mode) {
    const v1::GetServerInfoResponse info = Info();
    return std::count(info.modes().begin(), info.modes().end(), mode) > 0;
  }

  static v1::OpenSessionRequest OpenRequest(v1::PageFormat format) {
    v1::OpenSessionRequest request;
    request.mutable_model()->set_num_layers(kLayers);
    request.mutable_model()->set_num_q_heads(kQHeads);
    request.mutable_model()->set_num_kv_heads(kKvHeads);
    request.mutable_model()->set_head_dim(kDim);
    request.set_page_format(format);
    return request;
  }

  grpc::Status TryOpen(const v1::OpenSessionRequest& request, v1::SessionRef* session) {
    grpc::ClientContext context;
    v1::OpenSessionResponse response;
    grpc::Status status = stub_->OpenSession(&context, request, &response);
    session->set_session_id(response.session_id());
    session->set_epoch(response.epoch());
    return status;
  }
  v1::SessionRef Open(v1::PageFormat format) {
    v1::SessionRef session;
    const grpc::Status status = TryOpen(OpenRequest(format), &session);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return session;
  }

  // A chunk for all layers; every layer gets the same tokens.
  static v1::ImportKvRequest Chunk(const v1::SessionRef& session, int64_t position, int64_t tokens,
                                   const Floats& k, const Floats& v) {
    v1::ImportKvRequest request;
    request.set_session_id(session.session_id());
    request.set_epoch(session.epoch());
    request.set_num_layers(kLayers);
    request.set_position(position);
    Floats all_k, all_v;
    for (int layer = 0; layer < kLayers; ++layer) {
      all_k.insert(all_k.end(), k.begin(), k.end());
      all_v.insert(all_v.end(), v.begin(), v.end());
    }
    *request.mutable_k() = F32Tensor(all_k, {kLayers, tokens, kKvHeads, kDim});
    *request.mutable_v() = F32Tensor(all_v, {kLayers, tokens, kKvHeads, kDim});
    return request;
  }
  grpc::Status Import(const std::vector<v1::ImportKvRequest>& chunks,
                      v1::ImportKvResponse* response) {
    grpc::ClientContext context;
    auto writer = stub_->ImportKv(&context, response);
    for (const v1::ImportKvRequest& chunk : chunks) {
      if (!writer->Write(chunk)) break;
    }
    writer->WritesDone();
    return writer->Finish();
  }
  void ImportTokens(const v1::SessionRef& session, int64_t tokens, const Floats& k,
                    const Floats& v) {
    v1::ImportKvResponse response;
    const grpc::Status status = Import({Chunk(session, 0, tokens, k, v)}, &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    ASSERT_EQ(response.kv_len_size(), kLayers);
    EXPECT_EQ(response.kv_len(0), tokens);
  }

  static v1::SequenceInput* AddSequence(const v1::SessionRef& session, int64_t position,
                                        int32_t append_len, int32_t q_len, uint64_t step_id,
                                        v1::AttendRequest* request) {
    v1::SequenceInput* sequence = request->add_sequences();
    sequence->set_session_id(session.session_id());
    sequence->set_epoch(session.epoch());
    sequence->set_position(position);
    sequence->set_append_len(append_len);
    sequence->set_q_len(q_len);
    sequence->set_step_id(step_id);
    return sequence;
  }
  // One token of one sequence: appended and attended.
  static v1::AttendRequest StepRequest(const v1::SessionRef& session, int64_t position,
                                       uint64_t step_id, uint32_t seed) {
    v1::AttendRequest request;
    request.set_request_id(step_id);
    AddSequence(session, position, 1, 1, step_id, &request);
    *request.mutable_q() = F32Tensor(RandomFloats(kQRow, seed), {1, kQHeads, kDim});
    *request.mutable_k() = F32Tensor(RandomFloats(kKvRow, seed + 1), {1, kKvHeads, kDim});
    *request.mutable_v() = F32Tensor(RandomFloats(kKvRow, seed + 2), {1, kKvHeads, kDim});
    return request;
  }

  grpc::Status Attend(const v1::AttendRequest& request, v1::AttendResponse* response) {
    grpc::ClientContext context;
    return stub_->Attend(&context, request, response);
  }

  // Keeps the engine from its queue while it lives, so that what comes in stays there.
  class EngineHold {
   public:
    explicit EngineHold(Engine* engine) {
      held_ = engine->Post([this] {
        const MutexLock lock(&mutex_);
        reached_ = true;
        changed_.SignalAll();
        while (!released_) changed_.Wait(&mutex_);
        done_ = true;
        changed_.SignalAll();
      });
      const MutexLock lock(&mutex_);
      while (held_ && !reached_) changed_.Wait(&mutex_);
    }
    ~EngineHold() {
      const MutexLock lock(&mutex_);
      released_ = true;
      changed_.SignalAll();
      while (held_ && !done_) changed_.Wait(&mutex_);
    }

   private:
    Mutex mutex_;
    CondVar changed_;
    bool held_ = false, reached_ = false, released_ = false, done_ = false;
  };

  std::map<std::string, double> Samples() {
    const std::string address = server_->addresses().metrics;
    const int port = std::stoi(address.substr(address.rfind(':') + 1));
    return ParseExposition(HttpGet(port, "/metrics").body);
  }

  TempDir dir_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<v1::Attention::Stub> stub_;
};

}  // namespace adaattn

#endif  // ADAATTN_TESTS_INTEGRATION_SERVER_FIXTURE_H_

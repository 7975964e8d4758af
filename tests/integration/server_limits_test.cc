#include "tests/integration/bad_input_fixture.h"

namespace adaattn {
namespace {

using ::testing::HasSubstr;
using LimitsTest = BadInputTest;

TEST_F(LimitsTest, AnOversizeMessageIsRefusedByItsSize) {
  v1::AttendRequest request = Good();
  request.mutable_q()->mutable_data()->resize(512 << 10);
  v1::AttendResponse response;
  EXPECT_EQ(Attend(request, &response).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST_F(LimitsTest, ADeadlineThatIsPastRunsNothing) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() - std::chrono::seconds(1));
  v1::AttendResponse response;
  EXPECT_EQ(stub_->Attend(&context, Good(), &response).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
}

class SmallPoolTest : public BadInputTest {
 protected:
  ServerOptions Options() const override {
    ServerOptions options = BadInputTest::Options();
    options.max_message_bytes = 4 << 20;
    options.device.pool_bytes = 4 << 20;
    options.engine.pages.slab_bytes = 256 << 10;
    return options;
  }
};

TEST_F(SmallPoolTest, AnExhaustedPoolHarmsNobodyAndLeaksNothing) {
  const v1::SessionRef big = Open(v1::PAGE_FORMAT_FP32);
  constexpr int64_t kTokens = 512;  // 256 KiB of K and V a layer
  const Floats k = RandomFloats(kTokens * kKvRow, 1), v = RandomFloats(kTokens * kKvRow, 2);
  grpc::Status status;
  int64_t position = 0;
  for (; status.ok() && position < 64 * kTokens; position += kTokens) {
    v1::ImportKvResponse response;
    status = Import({Chunk(big, position, kTokens, k, v)}, &response);
  }
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("pool"));
}

class SmallQueueTest : public BadInputTest {
 protected:
  ServerOptions Options() const override {
    ServerOptions options = BadInputTest::Options();
    options.max_message_bytes = 22 << 10;
    options.engine.batcher.max_queued_bytes = 32 << 10;
    options.admission.max_client_inflight_bytes = 22 << 10;
    options.admission.max_inflight_bytes = 22 << 10;
    return options;
  }
};

TEST_F(SmallQueueTest, AFullQueueSaysWhenToComeAgain) {
  // What comes in stays in flight: two messages fill the limit.
  auto hold = std::make_unique<EngineHold>(server_->engine());
  constexpr int kRows = 8;  // 8 KiB of q: two messages fit, four are refused
  std::vector<v1::AttendRequest> requests(6);
  for (v1::AttendRequest& request : requests) {
    AddSequence(session_, 10, 0, kRows, 0, &request)->set_q_position(20);
    *request.mutable_q() = F32Tensor(RandomFloats(kRows * kQRow, 9), {kRows, kQHeads, kDim});
  }
  grpc::CompletionQueue queue;
  std::vector<grpc::ClientContext> contexts(requests.size());
  std::vector<v1::AttendResponse> responses(requests.size());
  std::vector<grpc::Status> statuses(requests.size());
  std::vector<std::unique_ptr<grpc::ClientAsyncResponseReader<v1::AttendResponse>>> calls;
  for (size_t i = 0; i < requests.size(); ++i) {
    calls.push_back(stub_->AsyncAttend(&contexts[i], requests[i], &queue));
    calls.back()->Finish(&responses[i], &statuses[i], &statuses[i]);
  }
  void* tag = nullptr;
  bool ok = false;
  for (int refused = 0; refused < 4; ++refused) {
    ASSERT_TRUE(queue.Next(&tag, &ok));
    const auto i = static_cast<grpc::Status*>(tag) - statuses.data();
    EXPECT_EQ(statuses[i].error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED)
        << statuses[i].error_message();
    EXPECT_EQ(contexts[i].GetServerTrailingMetadata().count("adaattn-retry-after-seconds"), 1u);
  }
  hold.reset();
  for (int answered = 0; answered < 2; ++answered) {
    ASSERT_TRUE(queue.Next(&tag, &ok));
    const auto i = static_cast<grpc::Status*>(tag) - statuses.data();
    EXPECT_TRUE(statuses[i].ok()) << statuses[i].error_message();
  }
}

}  // namespace
}  // namespace adaattn

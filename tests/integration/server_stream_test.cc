#include <thread>

#include "absl/time/clock.h"
#include "tests/integration/server_fixture.h"

namespace adaattn {
namespace {

using ::testing::HasSubstr;
using Stream = grpc::ClientReaderWriter<v1::AttendRequest, v1::AttendResponse>;

class StreamTest : public ServerFixture {
 protected:
  static constexpr int kWindow = 4;

  ServerOptions Options() const override {
    ServerOptions options = ServerFixture::Options();
    options.stream_window = kWindow;
    return options;
  }
  // Waits until no stream is open and nothing runs; the test's own timeout bounds it.
  void WaitForStreamsToEnd() {
    while (server_->metrics()->streams() > 0) absl::SleepFor(absl::Milliseconds(1));
  }
};

TEST_F(StreamTest, AnswersComeInOrderAndFarMoreThanAWindow) {
  const v1::SessionRef session = Open(v1::PAGE_FORMAT_BF16);
  grpc::ClientContext context;
  auto stream = stub_->AttendStream(&context);
  constexpr int kSteps = 100;
  std::thread writer([&] {
    for (int step = 0; step < kSteps; ++step) {
      EXPECT_TRUE(stream->Write(StepRequest(session, step, static_cast<uint64_t>(step) + 1, 7)));
    }
    stream->WritesDone();
  });
  v1::AttendResponse response;
  int answered = 0;
  while (stream->Read(&response)) {
    ++answered;
    EXPECT_EQ(response.request_id(), static_cast<uint64_t>(answered));
    ASSERT_EQ(response.sequences_size(), 1) << response.message();
    EXPECT_EQ(response.sequences(0).code(), 0) << response.sequences(0).message();
    EXPECT_EQ(response.sequences(0).kv_len(), answered);
  }
  writer.join();
  EXPECT_EQ(answered, kSteps);
  EXPECT_TRUE(stream->Finish().ok());
  WaitForStreamsToEnd();
  auto samples = Samples();
  EXPECT_EQ(samples["adaattn_requests_total{code=\"OK\",method=\"AttendStream\"}"], kSteps);
  EXPECT_EQ(samples["adaattn_streams"], 0);
}

TEST_F(StreamTest, AFailedMessageIsAnsweredInItsPlaceAndTheStreamLives) {
  const v1::SessionRef session = Open(v1::PAGE_FORMAT_BF16);
  grpc::ClientContext context;
  auto stream = stub_->AttendStream(&context);
  v1::AttendRequest bad = StepRequest(session, 1, 2, 1);
  bad.mutable_q()->set_shape(0, 3);
  ASSERT_TRUE(stream->Write(StepRequest(session, 0, 1, 1)));
  ASSERT_TRUE(stream->Write(bad));
  ASSERT_TRUE(stream->Write(StepRequest(session, 1, 3, 1)));
  stream->WritesDone();
  v1::AttendResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.code(), 0);
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.request_id(), 2u);
  EXPECT_EQ(response.code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(response.message(), HasSubstr("q.shape"));
  EXPECT_EQ(response.sequences_size(), 0);
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.sequences(0).kv_len(), 2);
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_TRUE(stream->Finish().ok());
}

// A step whose q goes ahead: the first message, and the one with its k and v.
std::pair<v1::AttendRequest, v1::AttendRequest> Split(v1::AttendRequest whole) {
  v1::AttendRequest kv;
  kv.set_request_id(whole.request_id());
  kv.mutable_k()->Swap(whole.mutable_k());
  kv.mutable_v()->Swap(whole.mutable_v());
  whole.clear_k();
  whole.clear_v();
  whole.set_kv_follows(true);
  return {whole, kv};
}

TEST_F(StreamTest, QueriesMayGoAheadOfTheirKeysAndValues) {
  const v1::SessionRef split = Open(v1::PAGE_FORMAT_BF16), whole = Open(v1::PAGE_FORMAT_BF16);
  grpc::ClientContext context;
  auto stream = stub_->AttendStream(&context);
  const auto [first, kv] = Split(StepRequest(split, 0, 1, 5));
  ASSERT_TRUE(stream->Write(first));
  ASSERT_TRUE(stream->Write(StepRequest(whole, 0, 2, 5)));
  ASSERT_TRUE(stream->Write(kv));
  stream->WritesDone();
  v1::AttendResponse one, two, none;
  ASSERT_TRUE(stream->Read(&one));
  ASSERT_TRUE(stream->Read(&two));
  EXPECT_FALSE(stream->Read(&none)) << "the answer comes once";
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(one.request_id(), 1u);
  ASSERT_EQ(one.sequences_size(), 1) << one.message();
  EXPECT_EQ(one.sequences(0).kv_len(), 1);
  EXPECT_EQ(one.o().data(), two.o().data());
}

TEST_F(StreamTest, KeysAndValuesThatNeverComeHoldNothingUp) {
  const v1::SessionRef session = Open(v1::PAGE_FORMAT_BF16);
  grpc::ClientContext context;
  auto stream = stub_->AttendStream(&context);
  ASSERT_TRUE(stream->Write(Split(StepRequest(session, 0, 1000, 5)).first));
  for (int step = 0; step < 3 * kWindow; ++step) {
    ASSERT_TRUE(stream->Write(StepRequest(session, step, static_cast<uint64_t>(step) + 1, 7)));
  }
  ASSERT_TRUE(stream->Write(Split(StepRequest(session, 50, 2000, 5)).first));
  stream->WritesDone();
  v1::AttendResponse response;
  std::vector<int> codes;
  while (stream->Read(&response)) codes.push_back(response.code());
  EXPECT_TRUE(stream->Finish().ok());
  ASSERT_EQ(codes.size(), 3u * kWindow + 2);
  for (size_t i = 0; i < codes.size(); ++i) {
    const bool split = i == 0 || i + 1 == codes.size();
    EXPECT_EQ(codes[i], split ? grpc::StatusCode::INVALID_ARGUMENT : grpc::StatusCode::OK) << i;
  }
}

TEST_F(StreamTest, AClientThatGoesAwayLeavesNothingBehind) {
  const v1::SessionRef session = Open(v1::PAGE_FORMAT_PROGRESSIVE);
  for (int round = 0; round < 5; ++round) {
    grpc::ClientContext context;
    auto stream = stub_->AttendStream(&context);
    for (int step = 0; step < 2 * kWindow; ++step) {
      if (!stream->Write(StepRequest(session, step, static_cast<uint64_t>(step) + 1, 7))) break;
    }
    ASSERT_TRUE(stream->Write(Split(StepRequest(session, 0, 5000, 5)).first));
    context.TryCancel();
    v1::AttendResponse response;
    while (stream->Read(&response)) {
    }
    EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  WaitForStreamsToEnd();
  server_->engine()->Quiesce();
  EXPECT_EQ(Samples()["adaattn_inflight_bytes"], 0);
  // The session is whole: it says its length, and takes the next step there.
  grpc::ClientContext context;
  v1::ListSessionsResponse list;
  ASSERT_TRUE(stub_->ListSessions(&context, {}, &list).ok());
  ASSERT_EQ(list.sessions_size(), 1);
  v1::AttendResponse response;
  ASSERT_TRUE(Attend(StepRequest(session, list.sessions(0).kv_len(), 77, 1), &response).ok());
  EXPECT_EQ(response.sequences(0).code(), 0) << response.sequences(0).message();
}

TEST_F(StreamTest, ManyStreamsShareBatchesAndKeepToThemselves) {
  constexpr int kStreams = 6, kSteps = 20;
  std::vector<std::string> last(kStreams);
  std::vector<std::thread> clients;
  clients.reserve(kStreams);
  for (int i = 0; i < kStreams; ++i) {
    clients.emplace_back([this, i, &last] {
      const v1::SessionRef session = Open(v1::PAGE_FORMAT_FP32);
      grpc::ClientContext context;
      auto stream = stub_->AttendStream(&context);
      v1::AttendResponse response;
      for (int step = 0; step < kSteps; ++step) {
        const auto id = static_cast<uint64_t>(step) + 1;
        ASSERT_TRUE(stream->Write(StepRequest(session, step, id, static_cast<uint32_t>(step))));
        ASSERT_TRUE(stream->Read(&response));
        ASSERT_EQ(response.sequences(0).code(), 0) << response.sequences(0).message();
      }
      stream->WritesDone();
      EXPECT_TRUE(stream->Finish().ok());
      last[static_cast<size_t>(i)] = response.o().data();
    });
  }
  for (std::thread& client : clients) client.join();
  // The same tokens in every session: the same bits, whoever shared the batch.
  for (const std::string& o : last) EXPECT_EQ(o, last[0]);
}

}  // namespace
}  // namespace adaattn

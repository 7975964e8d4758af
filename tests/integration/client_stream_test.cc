#include "tests/integration/client_fixture.h"

namespace adaattn::client {
namespace {

using absl::StatusCode;

class ClientStreamTest : public ClientTest {
 protected:
  // The next step of `session`: one token, whose values are `value`.
  AttendInput Input(const Session& session, float value) {
    AttendInput input;
    input.sequences.push_back(session.NextStep(0, 1, 1));
    q_.assign(kQHeads * kHeadDim, 0.25f);
    kv_.assign(kKvHeads * kHeadDim, value);
    input.q = Rows(q_, kQHeads);
    input.k = input.v = Rows(kv_, kKvHeads);
    return input;
  }

  std::vector<float> q_, kv_;
};

TEST_F(ClientStreamTest, AnswersComeInTheOrderOfTheMessages) {
  std::vector<std::unique_ptr<Session>> sessions;
  sessions.reserve(8);
  for (int i = 0; i < 8; ++i) sessions.push_back(Open());
  auto stream = client_->OpenStream();
  std::vector<uint64_t> ids;
  for (int i = 0; i < 8; ++i) {
    const auto id = stream->Send(Input(*sessions[i], static_cast<float>(i)));
    ASSERT_TRUE(id.ok()) << id.status();
    ids.push_back(*id);
  }
  for (int i = 0; i < 8; ++i) {
    const auto answer = stream->Receive();
    ASSERT_TRUE(answer.ok()) << answer.status();
    ASSERT_TRUE(answer->status.ok()) << answer->status;
    EXPECT_EQ(answer->request_id, ids[i]);
    EXPECT_FLOAT_EQ(answer->output.o.floats()[0], static_cast<float>(i));
    sessions[i]->StepAnswered(0, answer->output.sequences[0]);
    EXPECT_EQ(sessions[i]->length(0), 1);
  }
  const absl::Status status = stream->Finish();
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(stream->Send(Input(*sessions[0], 0)).status().code(), StatusCode::kFailedPrecondition);
}

TEST_F(ClientStreamTest, ALostStreamIsRestoredAndNothingIsAppendedTwice) {
  for (const StatusCode code : {StatusCode::kUnavailable, StatusCode::kCancelled}) {
    for (const bool after_applying : {false, true}) {
      std::vector<std::unique_ptr<Session>> sessions;
      sessions.reserve(5);
      for (int i = 0; i < 5; ++i) sessions.push_back(Open());
      auto stream = client_->OpenStream();
      fake()->AddFault({code, after_applying, false, 0, /*after=*/2});
      for (int i = 0; i < 5; ++i) {
        ASSERT_TRUE(stream->Send(Input(*sessions[i], static_cast<float>(i))).ok());
      }
      for (int i = 0; i < 5; ++i) {
        const auto answer = stream->Receive();
        ASSERT_TRUE(answer.ok()) << answer.status();
        ASSERT_TRUE(answer->status.ok()) << answer->status;
        EXPECT_FLOAT_EQ(answer->output.o.floats()[0], static_cast<float>(i));
        EXPECT_EQ(fake()->length(sessions[i]->ref().session_id, 0), 1);
      }
      EXPECT_TRUE(stream->Finish().ok());
    }
  }
}

TEST_F(ClientStreamTest, AnAnswerThatDoesNotComeInTimeIsAskedForAgain) {
  auto session = Open();
  StreamOptions options;
  options.answer_timeout = absl::Milliseconds(200);
  auto stream = client_->OpenStream(options);
  AttendInput input = Input(*session, 3);
  // The first part alone is never answered; the stream is restored until the retries end.
  ASSERT_TRUE(stream->SendQuery(input).ok());
  const auto answer = stream->Receive();
  EXPECT_EQ(answer.status().code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(waits().size(), 4u);
  EXPECT_EQ(stream->Receive().status().code(), StatusCode::kDeadlineExceeded);
}

TEST_F(ClientStreamTest, KeysMayFollowTheQuery) {
  auto session = Open();
  auto stream = client_->OpenStream();
  const AttendInput input = Input(*session, 4);
  const auto id = stream->SendQuery(input);
  ASSERT_TRUE(id.ok()) << id.status();
  EXPECT_EQ(stream->SendKeyValue(*id + 1, input.k, input.v).code(),
            StatusCode::kFailedPrecondition);
  ASSERT_TRUE(stream->SendKeyValue(*id, input.k, input.v).ok());
  EXPECT_EQ(stream->SendKeyValue(*id, input.k, input.v).code(), StatusCode::kFailedPrecondition);
  const auto answer = stream->Receive();
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_FLOAT_EQ(answer->output.o.floats()[0], 4);
}

TEST_F(ClientStreamTest, ARefusedMessageLeavesTheStreamAlive) {
  auto session = Open();
  auto stream = client_->OpenStream();
  fake()->AddFault({StatusCode::kInternal, false, /*in_message=*/true, 0, 0});
  ASSERT_TRUE(stream->Send(Input(*session, 1)).ok());
  auto answer = stream->Receive();
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->status.code(), StatusCode::kInternal);
  const auto output = stream->Attend(Input(*session, 1));
  EXPECT_TRUE(output.ok()) << output.status();
}

TEST_F(ClientStreamTest, AttendWaitsAsLongAsTheServerAsks) {
  auto session = Open();
  auto stream = client_->OpenStream();
  fake()->AddFault({StatusCode::kResourceExhausted, false, /*in_message=*/true,
                    /*retry_after_ms=*/5000, 0});
  const auto output = stream->Attend(Input(*session, 1));
  ASSERT_TRUE(output.ok()) << output.status();
  EXPECT_EQ(waits(), std::vector<absl::Duration>({absl::Seconds(5)}));
  EXPECT_EQ(fake()->length(session->ref().session_id, 0), 1);
}

TEST_F(ClientStreamTest, TooManyUnansweredMessagesAreRefused) {
  auto first = Open(), second = Open();
  StreamOptions options;
  options.max_unanswered = 1;
  auto stream = client_->OpenStream(options);
  ASSERT_TRUE(stream->Send(Input(*first, 1)).ok());
  EXPECT_EQ(stream->Send(Input(*second, 2)).status().code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(stream->Finish().code(), StatusCode::kFailedPrecondition);
  ASSERT_TRUE(stream->Receive().ok());
  EXPECT_EQ(stream->Receive().status().code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(stream->Send(Input(*second, 2)).ok());
}

TEST_F(ClientStreamTest, LongMessagesBothWaysDoNotBlockEachOther) {
  // More than the flow-control windows hold, sent before anything is received.
  constexpr int32_t kMessages = 64;
  std::vector<std::unique_ptr<Session>> sessions;
  auto stream = client_->OpenStream();
  const std::vector<float> q(512 * kQHeads * kHeadDim, 0.5f), kv(kKvHeads * kHeadDim, 1);
  for (int i = 0; i < kMessages; ++i) {
    sessions.push_back(Open());
    AttendInput input;
    input.sequences.push_back(sessions.back()->NextStep(0, 1, 512));
    input.q = Rows(q, kQHeads);
    input.k = input.v = Rows(kv, kKvHeads);
    ASSERT_TRUE(stream->Send(input).ok());
  }
  for (int i = 0; i < kMessages; ++i) {
    const auto answer = stream->Receive();
    ASSERT_TRUE(answer.ok()) << answer.status();
    EXPECT_EQ(answer->output.o.shape, Shape({512, kQHeads, kHeadDim}));
  }
}

TEST_F(ClientStreamTest, AStreamMayBeDroppedWithAnswersOutstanding) {
  auto session = Open();
  auto stream = client_->OpenStream();
  ASSERT_TRUE(stream->Send(Input(*session, 1)).ok());
  stream.reset();
  client_.reset();
  EXPECT_TRUE(session->Close().ok());
}

}  // namespace
}  // namespace adaattn::client

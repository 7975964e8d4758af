#include <cmath>
#include <thread>

#include "client/importer.h"
#include "tests/integration/client_fixture.h"

namespace adaattn::client {
namespace {

using absl::StatusCode;

class ClientSessionTest : public ClientTest {
 protected:
  // One appended token with its query.
  absl::StatusOr<AttendOutput> StepOnce(Session* session, int32_t layer = 0) {
    q_ = Random(kQHeads * kHeadDim);
    k_ = Random(kKvHeads * kHeadDim);
    v_ = Random(kKvHeads * kHeadDim);
    return Repeat(session, layer);
  }
  absl::StatusOr<AttendOutput> Repeat(Session* session, int32_t layer = 0) {
    Step step;
    step.layer = layer;
    step.append_len = step.q_len = 1;
    step.q = Rows(q_, kQHeads);
    step.k = Rows(k_, kKvHeads);
    step.v = Rows(v_, kKvHeads);
    return session->Attend(step);
  }

  std::vector<float> q_, k_, v_;
};

TEST_F(ClientSessionTest, AttendsOverWhatWasImported) {
  auto session = Open();
  const std::vector<float> k = Random(3 * kKvHeads * kHeadDim);
  const std::vector<float> v = Random(3 * kKvHeads * kHeadDim);
  ASSERT_TRUE(session->Import({0, Rows(k, kKvHeads), Rows(v, kKvHeads), {}, {}, {}}).ok());
  EXPECT_EQ(session->length(0), 3);
  const auto output = StepOnce(session.get());
  ASSERT_TRUE(output.ok()) << output.status();
  EXPECT_EQ(session->length(0), 4);
  EXPECT_EQ(output->o.shape, Shape({1, kQHeads, kHeadDim}));
  // Head 1 reads kv head 0: softmax over 4 tokens, by hand.
  double scores[4], total = 0, expected = 0;
  for (int t = 0; t < 4; ++t) {
    const float* key = t < 3 ? &k[t * kKvHeads * kHeadDim] : k_.data();
    double score = 0;
    for (int c = 0; c < kHeadDim; ++c) score += q_[kHeadDim + c] * key[c];
    scores[t] = std::exp(score / std::sqrt(kHeadDim));
    total += scores[t];
  }
  for (int t = 0; t < 4; ++t) {
    expected += scores[t] / total * (t < 3 ? v[t * kKvHeads * kHeadDim + 5] : v_[5]);
  }
  EXPECT_NEAR(output->o.floats()[kHeadDim + 5], expected, 1e-5);
  EXPECT_NEAR(output->lse.floats()[1], std::log(total), 1e-5);
  ASSERT_TRUE(output->sequences[0].decision.has_value());
  EXPECT_EQ(output->sequences[0].decision->bytes_bf16, 4 * kKvHeads * kHeadDim * 4);
}

TEST_F(ClientSessionTest, ImportsAreCutBelowTheMessageLimitInEveryLayer) {
  auto session = Open(/*num_layers=*/3, /*start_position=*/1000);
  const int64_t tokens = 300;  // 300 KiB a layer against 64 KiB messages
  const std::vector<float> k = Random(2 * tokens * kKvHeads * kHeadDim);
  const std::vector<float> v = Random(2 * tokens * kKvHeads * kHeadDim);
  ImportInput input;
  input.first_layer = 1;
  input.k = MakeView<float>(DType::kF32, {2, tokens, kKvHeads, kHeadDim}, k);
  input.v = MakeView<float>(DType::kF32, {2, tokens, kKvHeads, kHeadDim}, v);
  const absl::Status status = session->Import(input);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(session->length(0), 0);
  EXPECT_EQ(session->length(1), tokens);
  EXPECT_EQ(session->length(2), tokens);
  std::vector<float> back;
  ASSERT_TRUE(session
                  ->Export({2, 1, 0, 0, DType::kF32},
                           [&](const ExportChunk& chunk) {
                             const auto floats = chunk.k.floats();
                             back.insert(back.end(), floats.begin(), floats.end());
                             return absl::OkStatus();
                           })
                  .ok());
  EXPECT_EQ(back, std::vector<float>(k.begin() + k.size() / 2, k.end()));
}

TEST_F(ClientSessionTest, AnImportCutOffAnywhereEndsWithEveryTokenOnce) {
  for (const bool after_applying : {false, true}) {
    for (int32_t at = 0; at < 10; ++at) {
      auto session = Open(/*num_layers=*/2);
      const int64_t tokens = 300;
      const std::vector<float> k = Random(2 * tokens * kKvHeads * kHeadDim);
      ImportInput input;
      input.k = MakeView<float>(DType::kF32, {2, tokens, kKvHeads, kHeadDim}, k);
      input.v = input.k;
      fake()->AddFault({StatusCode::kUnavailable, after_applying, false, 0, at});
      const absl::Status status = session->Import(input);
      ASSERT_TRUE(status.ok()) << status << " at " << at;
      EXPECT_EQ(fake()->length(session->ref().session_id, 0), tokens);
      EXPECT_EQ(fake()->length(session->ref().session_id, 1), tokens);
      std::vector<float> back;
      ASSERT_TRUE(session
                      ->Export({1, 1, 0, 0, DType::kF32},
                               [&](const ExportChunk& chunk) {
                                 const auto floats = chunk.k.floats();
                                 back.insert(back.end(), floats.begin(), floats.end());
                                 return absl::OkStatus();
                               })
                      .ok());
      EXPECT_EQ(back, std::vector<float>(k.begin() + k.size() / 2, k.end()));
    }
  }
}

TEST_F(ClientSessionTest, TheQuerySampleTravelsWithTheImport) {
  auto session = Open();
  const std::vector<float> k = Random(200 * kKvHeads * kHeadDim);
  const std::vector<float> sample = Random(2 * kQHeads * kHeadDim);
  ASSERT_TRUE(
      session->Import({0, Rows(k, kKvHeads), Rows(k, kKvHeads), Rows(sample, kQHeads), {}, {}})
          .ok());
  EXPECT_EQ(fake()->query_sample_first(), sample[0]);
}

TEST_F(ClientSessionTest, AWrongTensorIsRefusedBeforeItIsSent) {
  auto session = Open();
  const std::vector<float> k = Random(3 * kKvHeads * kHeadDim);
  TensorView wrong = Rows(k, kKvHeads);
  wrong.shape[0] = 4;
  const absl::Status bytes = session->Import({0, wrong, wrong, {}, {}, {}});
  EXPECT_EQ(bytes.code(), StatusCode::kInvalidArgument);
  const absl::Status layer = session->Import({1, Rows(k, kKvHeads), Rows(k, kKvHeads), {}, {}, {}});
  EXPECT_EQ(layer.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(layer.message().find("first_layer 1"), absl::string_view::npos) << layer;
}

TEST_F(ClientSessionTest, ALostAnswerIsAskedAgainAndAppendedOnce) {
  for (const StatusCode code :
       {StatusCode::kUnavailable, StatusCode::kCancelled, StatusCode::kDeadlineExceeded}) {
    for (const bool after_applying : {false, true}) {
      auto session = Open();
      ASSERT_TRUE(StepOnce(session.get()).ok());
      fake()->AddFault({code, after_applying, false, 0, 0});
      const auto output = StepOnce(session.get());
      ASSERT_TRUE(output.ok()) << output.status();
      EXPECT_EQ(output->sequences[0].replayed, after_applying);
      EXPECT_EQ(fake()->length(session->ref().session_id, 0), 2);
      EXPECT_EQ(session->length(0), 2);
    }
  }
}

TEST_F(ClientSessionTest, OtherErrorsAreReturnedAtOnce) {
  auto session = Open();
  const int32_t before = fake()->num_attends();
  fake()->AddFault({StatusCode::kInternal, false, false, 0, 0});
  EXPECT_EQ(StepOnce(session.get()).status().code(), StatusCode::kInternal);
  EXPECT_EQ(fake()->num_attends(), before + 1);
}

TEST_F(ClientSessionTest, RetriesEndAndTheSameStepMayBeAskedLater) {
  auto session = Open();
  for (int i = 0; i < 5; ++i) fake()->AddFault({StatusCode::kUnavailable, i == 4, false, 0, 0});
  EXPECT_EQ(StepOnce(session.get()).status().code(), StatusCode::kUnavailable);
  EXPECT_EQ(waits().size(), 4u);
  EXPECT_EQ(session->length(0), 0);  // as last heard
  const auto output = Repeat(session.get());
  ASSERT_TRUE(output.ok()) << output.status();
  EXPECT_TRUE(output->sequences[0].replayed);
  EXPECT_EQ(fake()->length(session->ref().session_id, 0), 1);
}

TEST_F(ClientSessionTest, AFullServerIsAskedAgainAfterItsHint) {
  auto session = Open();
  fake()->AddFault({StatusCode::kResourceExhausted, false, false, /*retry_after_ms=*/12345, 0});
  ASSERT_TRUE(StepOnce(session.get()).ok());
  EXPECT_EQ(waits(), std::vector<absl::Duration>({absl::Milliseconds(12345)}));
}

TEST_F(ClientSessionTest, OpeningIsRepeatedOnlyWhenNothingCanBeLeftBehind) {
  fake()->AddFault({StatusCode::kUnavailable, false, false, 0, 0});
  EXPECT_NE(Open(), nullptr);
  fake()->AddFault({StatusCode::kDeadlineExceeded, false, false, 0, 0});
  EXPECT_EQ(client_->OpenSession({}).status().code(), StatusCode::kDeadlineExceeded);
}

TEST_F(ClientSessionTest, TheHandleClosesItsSessionUnlessReleased) {
  auto closed = Open(), dropped = Open(), released = Open();
  EXPECT_EQ(fake()->num_sessions(), 3u);
  EXPECT_TRUE(closed->Close().ok());
  EXPECT_TRUE(closed->Close().ok());
  dropped.reset();
  const SessionRef ref = released->Release();
  released.reset();
  EXPECT_EQ(fake()->num_sessions(), 1u);
  EXPECT_TRUE(client_->CloseSession(ref).ok());
  EXPECT_EQ(fake()->num_sessions(), 0u);
}

TEST_F(ClientSessionTest, BranchesAndTruncationKeepTheirOwnLengths) {
  auto session = Open(/*num_layers=*/1, /*start_position=*/10);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(StepOnce(session.get()).ok());
  auto branches = session->Fork(2);
  ASSERT_TRUE(branches.ok()) << branches.status();
  ASSERT_EQ(branches->size(), 2u);
  ASSERT_TRUE(StepOnce((*branches)[0].get()).ok());
  const auto truncated = session->Truncate(11);
  ASSERT_TRUE(truncated.ok()) << truncated.status();
  EXPECT_EQ(truncated->kv_len, 1);
  EXPECT_EQ(session->length(0), 1);
  EXPECT_EQ((*branches)[0]->length(0), 4);
  EXPECT_EQ((*branches)[1]->length(0), 3);
  const auto output = StepOnce(session.get());
  ASSERT_TRUE(output.ok()) << output.status();
  EXPECT_FALSE(output->sequences[0].replayed);
  EXPECT_EQ(session->length(0), 2);
}

TEST_F(ClientSessionTest, OneBadSequenceLeavesTheOthersTheirAnswers) {
  auto good = Open(), bad = Open();
  AttendInput input;
  input.sequences = {bad->NextStep(0, 1, 1), good->NextStep(0, 1, 1)};
  input.sequences[0].session.session_id = "nobody";
  const std::vector<float> q = Random(2 * kQHeads * kHeadDim), k = Random(2 * kKvHeads * kHeadDim);
  input.q = Rows(q, kQHeads);
  input.k = input.v = Rows(k, kKvHeads);
  const auto output = client_->Attend(input);
  ASSERT_TRUE(output.ok()) << output.status();
  EXPECT_EQ(output->sequences[0].status.code(), StatusCode::kNotFound);
  EXPECT_TRUE(output->sequences[1].status.ok());
  bad->StepAnswered(0, output->sequences[0]);
  good->StepAnswered(0, output->sequences[1]);
  EXPECT_EQ(bad->length(0), 0);
  EXPECT_EQ(good->length(0), 1);
}

TEST_F(ClientSessionTest, EveryCallCarriesTheRoute) {
  auto session = Open();
  ASSERT_TRUE(StepOnce(session.get()).ok());
  ASSERT_TRUE(client_->GetServerInfo().ok());
  EXPECT_EQ(fake()->routes(), std::set<std::string>({"test-route"}));
  SessionOptions options;
  options.model = {1, kQHeads, kKvHeads, kHeadDim, 0};
  options.route_key = "other";
  auto other = client_->OpenSession(options);
  ASSERT_TRUE(other.ok()) << other.status();
  ASSERT_TRUE(StepOnce(other->get()).ok());
  EXPECT_EQ(fake()->routes(), std::set<std::string>({"test-route", "other"}));
}

TEST_F(ClientSessionTest, ListsEverySessionAndRenewsLeases) {
  auto first = Open(), second = Open();
  ASSERT_TRUE(StepOnce(second.get()).ok());
  const auto sessions = client_->ListSessions();
  ASSERT_TRUE(sessions.ok()) << sessions.status();
  ASSERT_EQ(sessions->size(), 2u);
  EXPECT_EQ((*sessions)[1].kv_len, 1);
  const auto leases = client_->KeepAlive({first->ref(), {"nobody", 1}});
  ASSERT_TRUE(leases.ok()) << leases.status();
  ASSERT_EQ(leases->size(), 2u);
  EXPECT_EQ((*leases)[0].left, absl::Seconds(60));
  EXPECT_EQ((*leases)[1].status.code(), StatusCode::kNotFound);
  EXPECT_EQ(first->KeepAlive().value_or(absl::ZeroDuration()), absl::Seconds(60));
}

TEST_F(ClientSessionTest, SessionsOfOneClientMayStepAtTheSameTime) {
  client_ = MakeClient(/*num_channels=*/3);
  constexpr int kThreads = 4;
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([this, i] {
      SessionOptions options;
      options.model = {1, kQHeads, kKvHeads, kHeadDim, 0};
      auto session = client_->OpenSession(options);
      ASSERT_TRUE(session.ok()) << session.status();
      const std::vector<float> q(kQHeads * kHeadDim, 0.5f), k(kKvHeads * kHeadDim, i);
      for (int step = 1; step <= 20; ++step) {
        Step input;
        input.append_len = input.q_len = 1;
        input.q = Rows(q, kQHeads);
        input.k = input.v = Rows(k, kKvHeads);
        const auto output = (*session)->Attend(input);
        ASSERT_TRUE(output.ok()) << output.status();
        ASSERT_EQ(output->sequences[0].kv_len, step);
        ASSERT_FLOAT_EQ(output->o.floats()[0], i);  // every value is i
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(ClientTest, OptionsOutOfRangeAreNamed) {
  ClientOptions options;
  EXPECT_EQ(Client::Create(options).status().code(), StatusCode::kInvalidArgument);
  options.address = "localhost:1";
  EXPECT_TRUE(Client::Create(options).ok());
  options.route_key = "no spaces";
  EXPECT_NE(Client::Create(options).status().message().find("route_key"), absl::string_view::npos);
  options.route_key = "";
  options.num_channels = 0;
  EXPECT_NE(Client::Create(options).status().message().find("num_channels 0"),
            absl::string_view::npos);
}

TEST(ClientTest, AnUnreachableServerIsUnavailable) {
  ClientOptions options;
  options.address = "unix:/nonexistent/adaattn.sock";
  options.retry.max_attempts = 2;
  options.retry.sleep = [](absl::Duration) {};
  auto client = Client::Create(options);
  ASSERT_TRUE(client.ok());
  EXPECT_EQ((*client)->GetServerInfo().status().code(), StatusCode::kUnavailable);
}

}  // namespace
}  // namespace adaattn::client

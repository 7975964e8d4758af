// The client against the real server, in this process, over a Unix socket.

#include <unistd.h>

#include <cmath>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "client/cli_commands.h"
#include "client/client.h"
#include "client/lse_merge.h"
#include "client/replay.h"
#include "client/trace.h"
#include "server/server.h"
#include "tests/integration/client_rows.h"
#include "tests/support/test_backend.h"

namespace adaattn::client {
namespace {

constexpr int64_t kRowElements = kKvHeads * kHeadDim;

class ClientServerTest : public ClientRows {
 protected:
  void SetUp() override {
    char name[] = "/tmp/adaattn-real-XXXXXX";
    directory_ = mkdtemp(name);
    ServerOptions options;
    options.listen = options.metrics_listen = "";
    options.unix_socket = absl::StrCat(directory_, "/socket");
    options.backend = TestBackend();
    options.engine.seal.min_tokens = 0;  // whatever the device's tuning
    options.device.pool_bytes = int64_t{256} << 20;
    options.device.num_threads = 2;
    options.engine.audit_share = 1;
    auto server = Server::Start(options);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    ClientOptions client_options;
    client_options.address = absl::StrCat("unix:", options.unix_socket);
    auto client = Client::Create(client_options);
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
  }

  // Every page is back when the sessions are closed.
  void TearDown() override {
    const auto sessions = client_->ListSessions();
    ASSERT_TRUE(sessions.ok()) << sessions.status();
    EXPECT_TRUE(sessions->empty());
    const auto info = client_->GetServerInfo();
    ASSERT_TRUE(info.ok()) << info.status();
    EXPECT_EQ(info->pool_bytes_free, info->pool_bytes);
    client_.reset();
    server_.reset();
    (void)unlink(absl::StrCat(directory_, "/socket").c_str());
    (void)rmdir(directory_.c_str());
  }

  // One step under a budget, of a session with the profile.
  void AttendAudited(const std::string& profile) {
    constexpr int64_t kTokens = 1536;
    SessionOptions options;
    options.model = {1, kQHeads, kKvHeads, kHeadDim, 0};
    options.profile = profile;
    options.default_options.policy = Policy::kBudget;
    options.default_options.target_relative_error = 0.3f;
    auto session = client_->OpenSession(options);
    ASSERT_TRUE(session.ok()) << session.status();
    const std::vector<float> k = Random(kTokens * kRowElements), q = Random(kQHeads * kHeadDim);
    ImportInput input;
    input.k = input.v = Rows(k, kKvHeads);
    const absl::Status imported = (*session)->Import(input);
    ASSERT_TRUE(imported.ok()) << imported;
    server_->engine()->Quiesce();
    Step step;
    step.q_len = 1;
    step.q = Rows(q, kQHeads);
    const auto output = (*session)->Attend(step);
    ASSERT_TRUE(output.ok()) << output.status();
    server_->engine()->Quiesce();
  }

  std::string directory_;
  std::string printed_;  // by the last command
  std::unique_ptr<Server> server_;
};

TEST_F(ClientServerTest, AProfileSaysWhatItHolds) {
  Profile profile;
  profile.name = "said";
  profile.model = {2, kQHeads, kKvHeads, kHeadDim};
  profile.error_factors.assign(2 * kKvHeads, 0.5f);
  const absl::StatusOr<int64_t> bytes = client_->UploadProfile(profile);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  const absl::StatusOr<ProfileSummary> summary = client_->GetProfile("said");
  ASSERT_TRUE(summary.ok()) << summary.status();
  EXPECT_EQ(summary->model.num_layers, 2);
  EXPECT_EQ(summary->model.head_dim, kHeadDim);
  EXPECT_EQ(summary->bytes, *bytes);
  EXPECT_FALSE(summary->has_basis);
  EXPECT_EQ(summary->error_factors, profile.error_factors);
  EXPECT_EQ(summary->audits, std::vector<int64_t>(2 * kKvHeads));
  EXPECT_EQ(summary->audited_error_factors, profile.error_factors);
  EXPECT_TRUE(absl::IsNotFound(client_->GetProfile("unsaid").status()));

  Profile next;
  next.name = "next";
  next.extends = "said";
  next.model = profile.model;
  ASSERT_TRUE(client_->UploadProfile(next).ok());
  EXPECT_EQ(client_->GetProfile("next")->error_factors, profile.error_factors);
}

TEST_F(ClientServerTest, TheCommandAppliesWhatAuditsSay) {
  Profile profile;
  profile.name = "model";
  profile.model = {1, kQHeads, kKvHeads, kHeadDim};
  profile.error_factors.assign(kKvHeads, 2.0f);
  ASSERT_TRUE(client_->UploadProfile(profile).ok());
  const Command command = ProfileCommand();
  std::vector<Flag> flags = CommonFlags();
  flags.insert(flags.end(), command.flags.begin(), command.flags.end());
  const auto run = [&](std::vector<std::string> arguments) {
    arguments.push_back(absl::StrCat("--address=unix:", directory_, "/socket"));
    const auto args = Args::Parse(arguments, flags);
    EXPECT_TRUE(args.ok()) << args.status();
    ::testing::internal::CaptureStdout();
    auto code = command.run(*args);
    printed_ = ::testing::internal::GetCapturedStdout();
    return code;
  };
  EXPECT_EQ(*run({"model"}), kExitOk);
  EXPECT_NE(printed_.find("2.00 to 2.00   2.00 to 2.00"), std::string::npos) << printed_;

  ASSERT_NO_FATAL_FAILURE(AttendAudited("model"));
  const auto audited = client_->GetProfile("model");
  EXPECT_EQ(audited->audits, std::vector<int64_t>(kKvHeads, 1));
  ASSERT_NE(audited->audited_error_factors, profile.error_factors);
  EXPECT_EQ(*run({"model", "--apply-audits", "--json"}), kExitOk);
  EXPECT_NE(printed_.find("\"audited_error_factors\""), std::string::npos) << printed_;
  const auto applied = client_->GetProfile("model");
  EXPECT_EQ(applied->error_factors, audited->audited_error_factors);
  EXPECT_EQ(applied->audits, std::vector<int64_t>(kKvHeads));
  EXPECT_EQ(*run({}), kExitUsage);
  EXPECT_TRUE(absl::IsNotFound(run({"nobody"}).status()));
}

TEST_F(ClientServerTest, ShardsOfASequenceMergeIntoTheWhole) {
  constexpr int64_t kTokens = 300, kCut = 130;
  const std::vector<float> k = Random(kTokens * kRowElements), v = Random(kTokens * kRowElements);
  const std::vector<float> q = Random(kQHeads * kHeadDim);
  const auto attend = [&](int64_t begin, int64_t end) {
    auto session = Open(1, begin);
    const absl::Span<const float> all_k(k), all_v(v);
    const int64_t offset = begin * kRowElements, size = (end - begin) * kRowElements;
    const absl::Status imported = session->Import({0,
                                                   Rows(all_k.subspan(offset, size), kKvHeads),
                                                   Rows(all_v.subspan(offset, size), kKvHeads),
                                                   {},
                                                   {},
                                                   {}});
    EXPECT_TRUE(imported.ok()) << imported;
    Step step;
    step.q_len = 1;
    step.q = Rows(q, kQHeads);
    step.q_position = kTokens - 1;
    auto output = session->Attend(step);
    EXPECT_TRUE(output.ok()) << output.status();
    return *std::move(output);
  };
  const AttendOutput whole = attend(0, kTokens);
  const AttendOutput first = attend(0, kCut), second = attend(kCut, kTokens);
  std::vector<float> o(kQHeads * kHeadDim), lse(kQHeads);
  const PartialAttention parts[] = {{first.o.floats(), first.lse.floats()},
                                    {second.o.floats(), second.lse.floats()}};
  MergePartials(parts, absl::MakeSpan(o), absl::MakeSpan(lse));
  for (size_t i = 0; i < o.size(); ++i) EXPECT_NEAR(o[i], whole.o.floats()[i], 2e-6);
  for (size_t i = 0; i < lse.size(); ++i) EXPECT_NEAR(lse[i], whole.lse.floats()[i], 2e-6);
}

TEST_F(ClientServerTest, ASessionLivesThroughEveryCall) {
  constexpr int64_t kTokens = 150;
  auto session = Open(/*num_layers=*/2);
  const std::vector<float> k = Random(2 * kTokens * kRowElements);
  ImportInput input;
  input.k = input.v = MakeView<float>(DType::kF32, {2, kTokens, kKvHeads, kHeadDim}, k);
  const absl::Status imported = session->Import(input);
  ASSERT_TRUE(imported.ok()) << imported;
  EXPECT_EQ(session->length(1), kTokens);

  const std::vector<float> q = Random(kQHeads * kHeadDim), row = Random(kRowElements);
  Step step;
  step.append_len = step.q_len = 1;
  step.q = Rows(q, kQHeads);
  step.k = step.v = Rows(row, kKvHeads);
  const auto stream = client_->OpenStream({session->route_key(), 4, absl::ZeroDuration()});
  for (step.layer = 0; step.layer < 2; ++step.layer) {
    AttendInput message;
    message.layer = step.layer;
    message.sequences.push_back(session->NextStep(step.layer, 1, 1));
    message.q = step.q;
    message.k = message.v = step.k;
    const auto streamed = stream->Attend(message);
    ASSERT_TRUE(streamed.ok()) << streamed.status();
    ASSERT_TRUE(streamed->sequences[0].status.ok()) << streamed->sequences[0].status;
    // The session was not told: its next step is this one again, and is not appended twice.
    const auto again = session->Attend(step);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_TRUE(again->sequences[0].replayed);
    EXPECT_EQ(again->o.data, streamed->o.data);
    EXPECT_EQ(session->length(step.layer), kTokens + 1);
  }
  EXPECT_TRUE(stream->Finish().ok());

  auto branches = session->Fork(2);
  ASSERT_TRUE(branches.ok()) << branches.status();
  const auto truncated = session->Truncate(100);
  ASSERT_TRUE(truncated.ok()) << truncated.status();
  EXPECT_EQ(truncated->kv_len, 100);
  step.layer = 0;
  EXPECT_TRUE(session->Attend(step).ok());
  EXPECT_TRUE((*branches)[1]->Attend(step).ok());
  std::vector<float> back;
  const absl::Status exported =
      (*branches)[0]->Export({1, 1, 0, kTokens, DType::kF32}, [&](const ExportChunk& chunk) {
        back.insert(back.end(), chunk.k.floats().begin(), chunk.k.floats().end());
        return absl::OkStatus();
      });
  ASSERT_TRUE(exported.ok()) << exported;
  EXPECT_EQ(back, std::vector<float>(k.begin() + kTokens * kRowElements, k.end()));
  EXPECT_GT(session->KeepAlive().value_or(absl::ZeroDuration()), absl::ZeroDuration());
  EXPECT_EQ(client_->ListSessions()->size(), 3u);
  EXPECT_TRUE(session->Close().ok());
  EXPECT_EQ(session->Attend(step).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(ClientServerTest, AStepElsewhereIsRefusedAndNamesTheLength) {
  auto session = Open(1);
  AttendInput input;
  input.sequences.push_back(session->NextStep(0, 1, 0));
  input.sequences[0].position = 7;
  const std::vector<float> row = Random(kRowElements);
  input.k = input.v = Rows(row, kKvHeads);
  const auto output = client_->Attend(input, session->route_key());
  ASSERT_TRUE(output.ok()) << output.status();
  EXPECT_EQ(output->sequences[0].status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(output->sequences[0].kv_len, 0);
}

TEST_F(ClientServerTest, ReplaysMeetTheirLimitsWhateverTheTiming) {
  const auto trace = LoadTrace("data/smollm2-135m-layer15-8k.safetensors");
  ASSERT_TRUE(trace.ok()) << trace.status();
  ReplayConfig config;
  config.max_rows = 4;
  config.concurrency = 2;
  config.page_format = PageFormat::kF32;
  const auto exact = Replay(client_.get(), *trace, "smollm2", config, nullptr);
  ASSERT_TRUE(exact.ok()) << exact.status();
  EXPECT_LE(exact->relative_error_p99, 1e-5);
  EXPECT_LE(exact->lse_error_max, 1e-4);
  EXPECT_DOUBLE_EQ(exact->bytes_fraction, 2);

  config.page_format = PageFormat::kProgressive;
  config.options.policy = Policy::kThreshold;
  config.options.theta = 0.004f;
  const auto first = Replay(client_.get(), *trace, "smollm2", config, nullptr);
  const auto second = Replay(client_.get(), *trace, "smollm2", config, nullptr);
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_LE(first->relative_error_mean, 0.04);
  EXPECT_LE(first->bytes_fraction, 0.2);
  EXPECT_FLOAT_EQ(first->theta, 0.004f);  // a ladder ran in every step
  EXPECT_EQ(first->bytes_read, second->bytes_read);
  // On a GPU another batch is summed up in other parts.
  EXPECT_NEAR(first->relative_error_mean, second->relative_error_mean, 1e-6);
}

}  // namespace
}  // namespace adaattn::client

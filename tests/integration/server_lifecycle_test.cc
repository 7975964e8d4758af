#include <grpcpp/impl/codegen/client_unary_call.h>

#include "tests/integration/server_fixture.h"
#include "tests/support/health_watch.h"

namespace adaattn {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;

class LifecycleTest : public ServerFixture {
 protected:
  ServerOptions Options() const override {
    ServerOptions options = ServerFixture::Options();
    options.admin_listen = "127.0.0.1:0";
    options.sessions.max_tenant_sessions = 5;
    return options;
  }

  // A unary call of raw bytes.
  static grpc::Status RawCall(const std::string& target, const char* method,
                              const std::string& request, std::string* response) {
    const auto channel = Channel(target);
    const grpc::Slice slice(request);
    const grpc::ByteBuffer in(&slice, 1);
    grpc::ByteBuffer out;
    grpc::ClientContext context;
    const grpc::internal::RpcMethod rpc(method, grpc::internal::RpcMethod::NORMAL_RPC);
    grpc::Status status =
        grpc::internal::BlockingUnaryCall<grpc::ByteBuffer, grpc::ByteBuffer, grpc::ByteBuffer,
                                          grpc::ByteBuffer>(channel.get(), rpc, &context, in, &out);
    std::vector<grpc::Slice> slices;
    if (status.ok() && out.Dump(&slices).ok()) {
      for (const grpc::Slice& part : slices) {
        response->append(reinterpret_cast<const char*>(part.begin()), part.size());
      }
    }
    return status;
  }
};

TEST_F(LifecycleTest, InfoSaysWhatTheServerCanAndCannotDo) {
  const v1::GetServerInfoResponse info = Info();
  EXPECT_EQ(info.backend(), TestBackend());
  EXPECT_THAT(info.tuning(), ::testing::StartsWith("built-in")) << "no file was given";
  EXPECT_EQ(info.instance(), server_->sessions()->instance());
  EXPECT_THAT(info.head_dims(), Contains(128));
  EXPECT_THAT(info.page_formats(), Contains(v1::PAGE_FORMAT_PROGRESSIVE));
  EXPECT_TRUE(Offers(v1::MODE_STATISTICAL) && Offers(v1::POLICY_BUDGET));
  EXPECT_EQ(std::count(info.unsupported().begin(), info.unsupported().end(), "MODE_DETERMINISTIC"),
            Offers(v1::MODE_DETERMINISTIC) ? 0 : 1);
  if (info.backend() == "cpu") {
    EXPECT_TRUE(Offers(v1::MODE_DETERMINISTIC));
    EXPECT_TRUE(Offers(v1::POLICY_ENTROPY) && Offers(v1::POLICY_LEARNED));
  }
  EXPECT_EQ(info.exact_tier_bytes(), 0) << "not asked for";
  EXPECT_THAT(info.unsupported(), Contains("EXACT_TIER_HOST_PAGES"));
  EXPECT_EQ(info.pool_bytes(), int64_t{48} << 20);
  EXPECT_EQ(info.pool_bytes_free(), info.pool_bytes());
}

TEST_F(LifecycleTest, SessionIdsEmbedTheRoutingKey) {
  grpc::ClientContext context;
  context.AddMetadata("adaattn-route", "worker-7");
  v1::OpenSessionResponse session;
  ASSERT_TRUE(stub_->OpenSession(&context, OpenRequest(v1::PAGE_FORMAT_BF16), &session).ok());
  EXPECT_EQ(session.session_id().substr(0, 9), "worker-7~");
  EXPECT_EQ(session.page_format(), v1::PAGE_FORMAT_BF16);
  EXPECT_GT(session.lease_seconds(), 0);

  grpc::ClientContext bad;
  bad.AddMetadata("adaattn-route", "not a key!");
  const grpc::Status status = stub_->OpenSession(&bad, OpenRequest(v1::PAGE_FORMAT_BF16), &session);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("adaattn-route"));
}

TEST_F(LifecycleTest, ListsPagesOfSessionsAndRenewsLeases) {
  std::vector<v1::SessionRef> open;
  open.reserve(5);
  for (int i = 0; i < 5; ++i) open.push_back(Open(v1::PAGE_FORMAT_BF16));
  v1::SessionRef one_too_many;
  const grpc::Status full = TryOpen(OpenRequest(v1::PAGE_FORMAT_BF16), &one_too_many);
  EXPECT_EQ(full.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << full.error_message();
  ImportTokens(open[0], 70, RandomFloats(70 * kKvRow, 1), RandomFloats(70 * kKvRow, 2));

  std::map<std::string, v1::SessionSummary> seen;
  v1::ListSessionsRequest request;
  request.set_page_size(2);
  int pages = 0;
  do {
    grpc::ClientContext context;
    v1::ListSessionsResponse page;
    ASSERT_TRUE(stub_->ListSessions(&context, request, &page).ok());
    EXPECT_LE(page.sessions_size(), 2);
    for (const auto& summary : page.sessions()) seen[summary.session_id()] = summary;
    request.set_page_token(page.next_page_token());
    ++pages;
  } while (!request.page_token().empty());
  EXPECT_EQ(pages, 3);
  ASSERT_EQ(seen.size(), 5u);
  const v1::SessionSummary& filled = seen[open[0].session_id()];
  EXPECT_EQ(filled.kv_len(), 70);
  EXPECT_EQ(filled.pages_dense(), 2 * kLayers);
  EXPECT_GT(filled.bytes(), 0);

  v1::KeepAliveRequest keep;
  *keep.add_sessions() = open[1];
  keep.add_sessions()->set_session_id("r~nobody~1~1");
  grpc::ClientContext context;
  v1::KeepAliveResponse leases;
  ASSERT_TRUE(stub_->KeepAlive(&context, keep, &leases).ok());
  ASSERT_EQ(leases.leases_size(), 2);
  EXPECT_EQ(leases.leases(0).code(), 0);
  EXPECT_GT(leases.leases(0).lease_seconds(), 0);
  EXPECT_NE(leases.leases(1).code(), 0);
}

TEST_F(LifecycleTest, ProfilesGiveSessionsTheirBasis) {
  v1::UploadProfileRequest profile;
  profile.set_name("model-a");
  *profile.mutable_model() = OpenRequest(v1::PAGE_FORMAT_BF16).model();
  Floats identity;
  for (int matrix = 0; matrix < kLayers * kKvHeads; ++matrix) {
    for (int i = 0; i < kDim * kDim; ++i) identity.push_back(i % (kDim + 1) == 0 ? 1.0f : 0.0f);
  }
  *profile.mutable_basis_mean() =
      F32Tensor(Floats(kLayers * kKvHeads * kDim), {kLayers, kKvHeads, kDim});
  *profile.mutable_basis() = F32Tensor(identity, {kLayers, kKvHeads, kDim, kDim});
  grpc::ClientContext context;
  v1::UploadProfileResponse uploaded;
  const grpc::Status status = stub_->UploadProfile(&context, profile, &uploaded);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(uploaded.bytes(),
            4 * (kLayers * kKvRow + kLayers * kKvRow * kDim) +
                static_cast<int64_t>(kLayers * kKvHeads * sizeof(PredictionAudits)));

  v1::OpenSessionRequest open = OpenRequest(v1::PAGE_FORMAT_PROGRESSIVE);
  open.set_profile("model-a");
  v1::SessionRef session;
  ASSERT_TRUE(TryOpen(open, &session).ok());
  // Far fewer tokens than a fit needs: pages are sealed with the profile's basis.
  ImportTokens(session, 256, RandomFloats(256 * kKvRow, 1), RandomFloats(256 * kKvRow, 2));
  server_->engine()->Quiesce();
  EXPECT_GT(server_->engine()->page_stats().pages[1], 0);

  open.mutable_model()->set_num_layers(kLayers + 1);
  const grpc::Status other = TryOpen(open, &session);
  EXPECT_EQ(other.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << other.error_message();

  profile.set_name("has space");
  grpc::ClientContext bad;
  EXPECT_EQ(stub_->UploadProfile(&bad, profile, &uploaded).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(LifecycleTest, TheUnixSocketIsTheSameServer) {
  const v1::SessionRef session = Open(v1::PAGE_FORMAT_BF16);
  stub_ = v1::Attention::NewStub(Channel("unix:" + server_->addresses().unix));
  v1::AttendResponse response;
  ASSERT_TRUE(Attend(StepRequest(session, 0, 1, 1), &response).ok());
  EXPECT_EQ(response.sequences(0).kv_len(), 1);
  auto samples = Samples();
  const v1::AttendRequest sent = StepRequest(session, 0, 1, 1);
  EXPECT_EQ(samples["adaattn_wire_bytes_total{direction=\"in\",transport=\"unix\"}"],
            sent.ByteSizeLong());
  EXPECT_EQ(samples["adaattn_wire_bytes_total{direction=\"out\",transport=\"unix\"}"],
            response.ByteSizeLong());
  EXPECT_EQ(samples["adaattn_wire_bytes_total{direction=\"in\",transport=\"tcp\"}"], 0);
}

TEST_F(LifecycleTest, HealthFollowsTheDrain) {
  std::string health;
  const char* const check = "/grpc.health.v1.Health/Check";
  ASSERT_TRUE(RawCall(server_->addresses().grpc, check, "", &health).ok());
  EXPECT_EQ(health, std::string("\x08\x01", 2)) << "SERVING";
  HealthWatch all(Channel(server_->addresses().grpc), "");
  HealthWatch service(Channel(server_->addresses().grpc), "adaattn.v1.Attention");
  HealthWatch other(Channel(server_->addresses().grpc), "no.such.Service");
  EXPECT_EQ(all.Next(), HealthWatch::kServing);
  EXPECT_EQ(service.Next(), HealthWatch::kServing);
  EXPECT_EQ(other.Next(), HealthWatch::kServiceUnknown);
  server_->StopAccepting();
  EXPECT_EQ(all.Next(), HealthWatch::kNotServing);
  EXPECT_EQ(service.Next(), HealthWatch::kNotServing);
  health.clear();
  ASSERT_TRUE(RawCall(server_->addresses().grpc, check, "", &health).ok());
  EXPECT_EQ(health, std::string("\x08\x02", 2)) << "NOT_SERVING";
  v1::SessionRef session;
  EXPECT_EQ(TryOpen(OpenRequest(v1::PAGE_FORMAT_BF16), &session).error_code(),
            grpc::StatusCode::UNAVAILABLE);
}

TEST_F(LifecycleTest, ReflectionAndChannelzAreOnTheAdminPortOnly) {
  const std::string& admin = server_->addresses().admin;
  const std::string& open = server_->addresses().grpc;
  const char* const channelz = "/grpc.channelz.v1.Channelz/GetServers";
  const char* const reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
  const std::string list_services("\x3a\x01*", 3);
  std::string reply;
  EXPECT_TRUE(RawCall(admin, channelz, "", &reply).ok());
  EXPECT_TRUE(RawCall(admin, reflection, list_services, &reply).ok());
  EXPECT_THAT(reply, HasSubstr("grpc.channelz.v1.Channelz"));
  EXPECT_EQ(RawCall(open, channelz, "", &reply).error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_EQ(RawCall(open, reflection, list_services, &reply).error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
}

}  // namespace
}  // namespace adaattn

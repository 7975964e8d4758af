#include <unistd.h>

#include <filesystem>

#include "absl/time/clock.h"
#include "tests/integration/server_fixture.h"
#include "tests/support/tls_files.h"

namespace adaattn {
namespace {

// The server reads its certificate through a link, DIR/now, as it would a mounted secret.
class TlsTest : public ServerFixture {
 protected:
  ServerOptions Options() const override {
    ServerOptions options = ServerFixture::Options();
    options.tls_cert = dir_.File("now/server.pem");
    options.tls_key = dir_.File("now/server.key");
    options.tls_ca = files_.Path("ca.pem");
    options.tls_reload = absl::Seconds(1);
    return options;
  }
  void SetUp() override {
    for (const char* tenant : {"tenant-a", "tenant-b"}) {
      files_.Issue(tenant, std::string("DNS:") + tenant);
    }
    Rotate("first");
    ServerFixture::SetUp();
    stub_ = StubOf("tenant-a");
  }

  // Makes a new server certificate and puts it in the place of the old one, all at once.
  void Rotate(const std::string& folder) {
    files_.Issue("server", "DNS:localhost,IP:127.0.0.1");
    std::filesystem::create_directory(dir_.File(folder));
    for (const char* file : {"server.pem", "server.key"}) {
      std::filesystem::rename(files_.Path(file), dir_.File(folder) + "/" + file);
    }
    std::filesystem::create_symlink(dir_.File(folder), dir_.File("next"));
    std::filesystem::rename(dir_.File("next"), dir_.File("now"));
  }

  // `name` "": a client that trusts the server but shows no certificate.
  std::unique_ptr<v1::Attention::Stub> StubOf(const std::string& name) {
    grpc::SslCredentialsOptions options;
    options.pem_root_certs = files_.Text("ca.pem");
    if (!name.empty()) {
      options.pem_cert_chain = files_.Text(name + ".pem");
      options.pem_private_key = files_.Text(name + ".key");
    }
    // A connection of its own, also for the same target.
    grpc::ChannelArguments arguments;
    arguments.SetInt("adaattn.test.channel", ++channels_);
    return v1::Attention::NewStub(grpc::CreateCustomChannel(
        server_->addresses().grpc, grpc::SslCredentials(options), arguments));
  }
  // The certificate that the server shows on the stub's connection; "" where it cannot be had.
  static std::string ServerCertificate(v1::Attention::Stub* stub) {
    grpc::ClientContext context;
    v1::GetServerInfoResponse info;
    if (!stub->GetServerInfo(&context, {}, &info).ok()) return "";
    const auto shown = context.auth_context()->FindPropertyValues("x509_pem_cert");
    return shown.empty() ? "" : std::string(shown[0].data(), shown[0].size());
  }

  const TlsFiles files_{dir_.File("")};
  int channels_ = 0;
};

TEST_F(TlsTest, ARotatedCertificateServesNewConnectionsAndOldOnesLive) {
  const std::string first = ServerCertificate(stub_.get());
  EXPECT_EQ(first, ReadFile(dir_.File("first/server.pem")));
  Rotate("second");
  const std::string second = ReadFile(dir_.File("second/server.pem"));
  ASSERT_NE(first, second);
  const absl::Time deadline = absl::Now() + absl::Seconds(30);
  std::string shown;
  while (shown != second && absl::Now() < deadline) {
    shown = ServerCertificate(StubOf("tenant-a").get());
    EXPECT_TRUE(shown == first || shown == second) << "a handshake failed";
    absl::SleepFor(absl::Milliseconds(50));
  }
  EXPECT_EQ(shown, second);
  EXPECT_EQ(ServerCertificate(stub_.get()), first) << "the open connection was cut";
}

TEST_F(TlsTest, ASessionBelongsToTheTenantOfItsCertificate) {
  const v1::SessionRef session = Open(v1::PAGE_FORMAT_BF16);
  v1::AttendResponse own;
  ASSERT_TRUE(Attend(StepRequest(session, 0, 1, 1), &own).ok());
  EXPECT_EQ(own.sequences(0).code(), 0) << own.sequences(0).message();

  const auto other = StubOf("tenant-b");
  grpc::ClientContext attend, list, close;
  v1::AttendResponse foreign;
  ASSERT_TRUE(other->Attend(&attend, StepRequest(session, 1, 2, 1), &foreign).ok());
  EXPECT_EQ(foreign.sequences(0).code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_FALSE(foreign.has_o()) << "nothing of it leaves";
  v1::ListSessionsResponse sessions;
  ASSERT_TRUE(other->ListSessions(&list, {}, &sessions).ok());
  EXPECT_EQ(sessions.sessions_size(), 0);
  v1::CloseSessionRequest request;
  *request.mutable_session() = session;
  v1::CloseSessionResponse closed;
  EXPECT_EQ(other->CloseSession(&close, request, &closed).error_code(),
            grpc::StatusCode::PERMISSION_DENIED);
}

TEST_F(TlsTest, AProfileBelongsToTheTenantOfItsCertificate) {
  v1::UploadProfileRequest profile;
  profile.set_name("own");
  *profile.mutable_model() = OpenRequest(v1::PAGE_FORMAT_BF16).model();
  v1::GetProfileRequest request;
  request.set_name("own");
  const auto other = StubOf("tenant-b");
  grpc::ClientContext upload, own, foreign;
  v1::UploadProfileResponse uploaded;
  v1::GetProfileResponse found;
  ASSERT_TRUE(stub_->UploadProfile(&upload, profile, &uploaded).ok());
  EXPECT_TRUE(stub_->GetProfile(&own, request, &found).ok());
  EXPECT_EQ(other->GetProfile(&foreign, request, &found).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(TlsTest, WithoutACertificateNobodyComesIn) {
  grpc::ClientContext context, plain_context;
  v1::GetServerInfoResponse info;
  EXPECT_EQ(StubOf("")->GetServerInfo(&context, {}, &info).error_code(),
            grpc::StatusCode::UNAVAILABLE);
  const auto plain = v1::Attention::NewStub(Channel(server_->addresses().grpc));
  EXPECT_EQ(plain->GetServerInfo(&plain_context, {}, &info).error_code(),
            grpc::StatusCode::UNAVAILABLE);
}

}  // namespace
}  // namespace adaattn

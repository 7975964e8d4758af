#include <fstream>
#include <sstream>

#include "tests/integration/server_fixture.h"

namespace adaattn {
namespace {

using ::testing::HasSubstr;

std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// Certificates that tests/data/tls holds for nothing else; tenant-a and tenant-b have that SAN.
class TlsTest : public ServerFixture {
 protected:
  ServerOptions Options() const override {
    ServerOptions options = ServerFixture::Options();
    options.tls_cert = "data/tls/server.pem";
    options.tls_key = "data/tls/server.key";
    options.tls_ca = "data/tls/ca.pem";
    options.tls_reload = absl::Seconds(1);
    return options;
  }
  void SetUp() override {
    ServerFixture::SetUp();
    stub_ = StubOf("tenant-a");
  }
  // `name` "": a client that trusts the server but shows no certificate.
  std::unique_ptr<v1::Attention::Stub> StubOf(const std::string& name) {
    grpc::SslCredentialsOptions options;
    options.pem_root_certs = ReadFile("data/tls/ca.pem");
    if (!name.empty()) {
      options.pem_cert_chain = ReadFile("data/tls/" + name + ".pem");
      options.pem_private_key = ReadFile("data/tls/" + name + ".key");
    }
    return v1::Attention::NewStub(
        grpc::CreateChannel(server_->addresses().grpc, grpc::SslCredentials(options)));
  }
};

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

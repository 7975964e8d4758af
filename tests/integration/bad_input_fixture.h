#ifndef ADAATTN_TESTS_INTEGRATION_BAD_INPUT_FIXTURE_H_
#define ADAATTN_TESTS_INTEGRATION_BAD_INPUT_FIXTURE_H_

#include <string>
#include <vector>

#include "tests/integration/server_fixture.h"

namespace adaattn {

// A session with ten tokens that must stay exactly as they are, whatever comes in beside them.
class BadInputTest : public ServerFixture {
 protected:
  ServerOptions Options() const override {
    ServerOptions options = ServerFixture::Options();
    options.max_message_bytes = 256 << 10;
    options.max_tokens_per_session = 4096;
    return options;
  }

  void SetUp() override {
    ServerFixture::SetUp();
    session_ = Open(v1::PAGE_FORMAT_FP32);
    ImportTokens(session_, 10, RandomFloats(10 * kKvRow, 1), RandomFloats(10 * kKvRow, 2));
    before_ = AskNeighbour();
  }
  void TearDown() override {
    EXPECT_EQ(AskNeighbour(), before_) << "the neighbour's answer changed";
    ServerFixture::TearDown();
  }

  // The code of a request that asks for `what` and lacks something: the backend may not offer it.
  template <class What>
  grpc::StatusCode UnlessOffered(What what,
                                 grpc::StatusCode lacking = grpc::StatusCode::INVALID_ARGUMENT) {
    return Offers(what) ? lacking : grpc::StatusCode::UNIMPLEMENTED;
  }

  // The answer of the untouched session, as bytes.
  std::string AskNeighbour() {
    v1::AttendRequest request;
    AddSequence(session_, 10, 0, 1, 0, &request);
    *request.mutable_q() = F32Tensor(RandomFloats(kQRow, 9), {1, kQHeads, kDim});
    v1::AttendResponse response;
    const grpc::Status status = Attend(request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(response.sequences(0).kv_len(), 10) << "something was appended";
    return response.o().data() + response.lse().data();
  }

  v1::AttendRequest Good() const { return StepRequest(session_, 10, 1, 50); }

  // The whole call is refused with `code`, and the message says each of `parts`.
  void ExpectRefused(const v1::AttendRequest& request, grpc::StatusCode code,
                     const std::vector<std::string>& parts) {
    v1::AttendResponse response;
    const grpc::Status status = Attend(request, &response);
    EXPECT_EQ(status.error_code(), code) << status.error_message();
    for (const std::string& part : parts)
      EXPECT_THAT(status.error_message(), ::testing::HasSubstr(part));
  }
  // The call goes through, its first sequence does not.
  void ExpectSequenceRefused(const v1::AttendRequest& request, grpc::StatusCode code,
                             const std::string& part) {
    v1::AttendResponse response;
    const grpc::Status status = Attend(request, &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(response.sequences(0).code(), code) << response.sequences(0).message();
    EXPECT_THAT(response.sequences(0).message(), ::testing::HasSubstr(part));
  }

  v1::SessionRef session_;
  std::string before_;
};

}  // namespace adaattn

#endif  // ADAATTN_TESTS_INTEGRATION_BAD_INPUT_FIXTURE_H_

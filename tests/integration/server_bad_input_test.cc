#include <grpcpp/impl/codegen/client_unary_call.h>

#include <limits>

#include "tests/integration/bad_input_fixture.h"

namespace adaattn {
namespace {

using ::testing::HasSubstr;

TEST_F(BadInputTest, TensorsOfTheWrongFormAreNamed) {
  v1::AttendRequest request = Good();
  request.mutable_q()->set_shape(1, kQHeads + 1);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT,
                {"q.shape", "[1, 5, 64]", "[1, 4, 64]"});

  request = Good();
  request.mutable_q()->mutable_shape()->RemoveLast();
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"q.shape", "[1, 4]", "[1, 4, 64]"});

  request = Good();
  request.mutable_q()->mutable_data()->pop_back();
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT,
                {"q.data", "1023 bytes", "1024 bytes"});

  request = Good();
  request.mutable_k()->set_dtype(static_cast<v1::DataType>(17));
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"k.dtype", "17", "FP32"});

  request = Good();
  request.mutable_v()->set_dtype(v1::DATA_TYPE_UNSPECIFIED);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"v.dtype", "FP32"});

  request = Good();
  request.mutable_v()->set_dtype(v1::DATA_TYPE_BF16);
  request.mutable_v()->mutable_data()->resize(kKvRow * 2);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"dtypes", "fp32", "bf16"});

  request = Good();
  request.clear_v();
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"v: no tensor", "[1, 2, 64]"});

  request = Good();
  request.mutable_q()->add_scales(0.5f);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"q.scales", "FP8"});

  request = Good();
  request.set_output_dtype(v1::DATA_TYPE_FP8_E4M3);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"output_dtype", "BF16"});

  request = Good();
  request.mutable_q()->mutable_shared_memory()->set_region("r");
  ExpectRefused(request, grpc::StatusCode::UNIMPLEMENTED, {"q.shared_memory"});
}

TEST_F(BadInputTest, FieldsOutOfRangeAreNamed) {
  v1::AttendRequest request = Good();
  request.set_layer(kLayers);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"layer", "2", "from 0 to 1"});

  request = Good();
  request.set_layer(-1);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"layer", "-1"});

  request = Good();
  request.clear_sequences();
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"sequences", "from 1 to 1024"});

  request = Good();
  request.mutable_sequences(0)->set_q_len(0);
  request.mutable_sequences(0)->set_append_len(0);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT,
                {"sequences[0].q_len", "append_len 0"});

  request = Good();
  request.mutable_sequences(0)->set_step_id(0);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"sequences[0].step_id", "above 0"});

  request = Good();
  request.mutable_sequences(0)->set_q_len(-3);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"sequences[0].q_len", "-3"});

  request = Good();
  request.mutable_sequences(0)->set_position(-1);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"sequences[0].position", "-1"});

  request = Good();
  request.mutable_options()->set_theta(1.5f);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"options.theta", "1.5", "(0, 1]"});

  request = Good();
  request.mutable_options()->set_theta(std::numeric_limits<float>::quiet_NaN());
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"options.theta", "nan"});

  request = Good();
  request.mutable_options()->set_floor_key_bits(5);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"options.floor_key_bits", "5"});

  request = Good();
  request.mutable_options()->set_window(-5);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"options.window", "-5"});

  request = Good();
  request.mutable_options()->set_mode(v1::MODE_DETERMINISTIC);
  request.mutable_options()->set_max_relative_error(0.1f);
  ExpectRefused(request, UnlessOffered(v1::MODE_DETERMINISTIC), {"options.m"});
  request = Good();
  request.set_kv_follows(true);
  ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, {"kv_follows", "AttendStream"});
}

TEST_F(BadInputTest, BudgetsMustMakeSense) {
  using Options = v1::AttendOptions;
  const auto refuse = [this](void (*spoil)(Options*), const std::vector<std::string>& parts) {
    v1::AttendRequest request = Good();
    spoil(request.mutable_options());
    ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT, parts);
  };
  for (const float bad : {-0.1f, 1.5f, std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::infinity()}) {
    v1::AttendRequest request = Good();
    request.mutable_options()->set_target_relative_error(bad);
    ExpectRefused(request, grpc::StatusCode::INVALID_ARGUMENT,
                  {"options.target_relative_error", "(0, 1]"});
  }
  refuse(
      [](Options* o) {
        o->set_target_relative_error(0.1f);
        o->set_max_relative_error(0.05f);
      },
      {"options.max_relative_error", "0.05", "0.1"});
  refuse(
      [](Options* o) {
        o->set_mode(v1::MODE_EXACT);
        o->set_target_relative_error(0.1f);
      },
      {"options.target_relative_error", "unset with MODE_EXACT"});
  refuse(
      [](Options* o) {
        o->set_mode(v1::MODE_STATIC);
        o->set_policy(v1::POLICY_BUDGET);
      },
      {"options.policy", "MODE_STATIC"});
  refuse(
      [](Options* o) {
        o->set_mode(v1::MODE_STATISTICAL);
        o->set_static_rank(16);
      },
      {"options.static_rank", "MODE_STATISTICAL"});
  refuse(
      [](Options* o) {
        o->set_policy(v1::POLICY_BUDGET);
        o->set_theta(0.01f);
      },
      {"options.theta", "POLICY_BUDGET"});
  refuse(
      [](Options* o) {
        o->set_policy(v1::POLICY_THRESHOLD);
        o->set_max_relative_error(0.2f);
      },
      {"options.max_relative_error", "POLICY_THRESHOLD"});
  refuse([](Options* o) { o->set_policy(static_cast<v1::Policy>(77)); }, {"options.policy", "77"});
}

TEST_F(BadInputTest, NumbersThatAreNoneAppendNothing) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (const char which : {'q', 'k', 'v'}) {
      v1::AttendRequest request = Good();
      v1::Tensor* tensor = which == 'q'   ? request.mutable_q()
                           : which == 'k' ? request.mutable_k()
                                          : request.mutable_v();
      std::memcpy(tensor->mutable_data()->data() + 40, &bad, sizeof(bad));
      v1::AttendResponse response;
      ASSERT_TRUE(Attend(request, &response).ok());
      EXPECT_EQ(response.sequences(0).code(), grpc::StatusCode::INVALID_ARGUMENT) << which;
      EXPECT_THAT(response.sequences(0).message(),
                  HasSubstr(std::string("sequences[0].") + which + "[0, 0, 10]: " +
                            (std::isnan(bad) ? "nan" : "inf") + " is not allowed: only finite"));
      EXPECT_EQ(response.sequences(0).kv_len(), 10) << which;
      for (const float value : ReadF32(response.o())) EXPECT_EQ(value, 0);
    }
  }
}

TEST_F(BadInputTest, ValuesBeyondFp16PagesAppendNothing) {
  for (const v1::PageFormat format : {v1::PAGE_FORMAT_FP16, v1::PAGE_FORMAT_PROGRESSIVE}) {
    const v1::SessionRef session = Open(format);
    for (const char which : {'k', 'v'}) {
      v1::AttendRequest request = StepRequest(session, 0, 1, 50);
      v1::Tensor* tensor = which == 'k' ? request.mutable_k() : request.mutable_v();
      const float bad = -65600;
      std::memcpy(tensor->mutable_data()->data() + (kDim + 3) * sizeof(bad), &bad, sizeof(bad));
      v1::AttendResponse response;
      ASSERT_TRUE(Attend(request, &response).ok());
      EXPECT_EQ(response.sequences(0).code(), grpc::StatusCode::INVALID_ARGUMENT) << which;
      EXPECT_THAT(response.sequences(0).message(),
                  HasSubstr(std::string("sequences[0].") + which +
                            "[0, 1, 3]: -65600 is not allowed: only finite values from -65504 to "
                            "65504, the range of the session's FP16 pages"));
      EXPECT_EQ(response.sequences(0).kv_len(), 0) << which;
    }
  }
  v1::OpenSessionRequest wide = OpenRequest(v1::PAGE_FORMAT_PROGRESSIVE);
  wide.set_element_type(v1::DATA_TYPE_BF16);
  v1::SessionRef session;
  ASSERT_TRUE(TryOpen(wide, &session).ok());
  v1::AttendRequest request = StepRequest(session, 0, 1, 50);
  *request.mutable_k() = F32Tensor(Floats(kKvRow, 1e6f), {1, kKvHeads, kDim});
  v1::AttendResponse response;
  ASSERT_TRUE(Attend(request, &response).ok());
  EXPECT_EQ(response.sequences(0).code(), 0) << response.sequences(0).message();
}

TEST_F(BadInputTest, SessionsThatAreNotThereSayWhy) {
  v1::AttendRequest request = Good();
  request.mutable_sequences(0)->set_session_id("no session");
  ExpectSequenceRefused(request, grpc::StatusCode::INVALID_ARGUMENT, "session_id");

  request = Good();
  std::string* unknown = request.mutable_sequences(0)->mutable_session_id();
  unknown->back() = unknown->back() == '0' ? '1' : '0';
  ExpectSequenceRefused(request, grpc::StatusCode::NOT_FOUND, *unknown);

  request = Good();
  request.mutable_sequences(0)->set_epoch(9);
  ExpectSequenceRefused(request, grpc::StatusCode::FAILED_PRECONDITION, "epoch 9");

  const v1::SessionRef closed = Open(v1::PAGE_FORMAT_FP32);
  grpc::ClientContext context, again;
  v1::CloseSessionRequest close;
  *close.mutable_session() = closed;
  v1::CloseSessionResponse response;
  ASSERT_TRUE(stub_->CloseSession(&context, close, &response).ok());
  EXPECT_TRUE(stub_->CloseSession(&again, close, &response).ok()) << "closing twice is OK";
  ExpectSequenceRefused(StepRequest(closed, 0, 1, 1), grpc::StatusCode::NOT_FOUND, "closed");

  v1::OpenSessionRequest short_lived = OpenRequest(v1::PAGE_FORMAT_FP32);
  short_lived.set_lease_seconds(1e-6);
  v1::SessionRef expired;
  ASSERT_TRUE(TryOpen(short_lived, &expired).ok());
  ExpectSequenceRefused(StepRequest(expired, 0, 1, 1), grpc::StatusCode::FAILED_PRECONDITION,
                        "lease");

  // The id of another server.
  auto other = Server::Start([this] {
    ServerOptions options = Options();
    options.unix_socket.clear();
    return options;
  }());
  ASSERT_TRUE(other.ok()) << other.status();
  auto other_stub = v1::Attention::NewStub(Channel((*other)->addresses().grpc));
  grpc::ClientContext other_context;
  v1::OpenSessionResponse foreign;
  ASSERT_TRUE(
      other_stub->OpenSession(&other_context, OpenRequest(v1::PAGE_FORMAT_FP32), &foreign).ok());
  v1::SessionRef ref;
  ref.set_session_id(foreign.session_id());
  ref.set_epoch(foreign.epoch());
  ExpectSequenceRefused(StepRequest(ref, 0, 1, 1), grpc::StatusCode::FAILED_PRECONDITION,
                        "session lost");
}

TEST_F(BadInputTest, OneBadSequenceLeavesTheOthersUnharmed) {
  const v1::SessionRef other = Open(v1::PAGE_FORMAT_FP32);
  v1::AttendRequest request;
  AddSequence(session_, 10, 0, 1, 0, &request);
  AddSequence(other, 5, 1, 1, 1, &request);  // a gap: `other` is empty
  AddSequence(session_, 10, 0, 1, 0, &request)->set_session_id("nobody");
  *request.mutable_q() = F32Tensor(RandomFloats(3 * kQRow, 9), {3, kQHeads, kDim});
  *request.mutable_k() = F32Tensor(RandomFloats(kKvRow, 3), {1, kKvHeads, kDim});
  *request.mutable_v() = F32Tensor(RandomFloats(kKvRow, 4), {1, kKvHeads, kDim});
  v1::AttendResponse response;
  const grpc::Status status = Attend(request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.sequences_size(), 3);
  EXPECT_EQ(response.sequences(0).code(), 0) << response.sequences(0).message();
  EXPECT_EQ(response.sequences(1).code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(response.sequences(2).code(), grpc::StatusCode::INVALID_ARGUMENT);
  const Floats o = ReadF32(response.o());
  EXPECT_NE(o[0], 0);
  for (size_t i = kQRow; i < 3 * kQRow; ++i) EXPECT_EQ(o[i], 0) << i;
}

TEST_F(BadInputTest, MoreTokensThanGrantedAreRefused) {
  v1::OpenSessionRequest open = OpenRequest(v1::PAGE_FORMAT_FP32);
  open.set_max_tokens(2);
  v1::SessionRef small;
  ASSERT_TRUE(TryOpen(open, &small).ok());
  v1::AttendResponse response;
  ASSERT_TRUE(Attend(StepRequest(small, 0, 1, 1), &response).ok());
  ASSERT_TRUE(Attend(StepRequest(small, 1, 2, 2), &response).ok());
  EXPECT_EQ(response.sequences(0).code(), 0) << response.sequences(0).message();
  ExpectSequenceRefused(StepRequest(small, 2, 3, 3), grpc::StatusCode::INVALID_ARGUMENT,
                        "max_tokens of 2");
}

TEST_F(BadInputTest, BrokenBytesAreInvalidAndHarmless) {
  const auto channel = Channel(server_->addresses().grpc);
  grpc::internal::RpcMethod method("/adaattn.v1.Attention/Attend",
                                   grpc::internal::RpcMethod::NORMAL_RPC);
  const std::string good = Good().SerializeAsString();
  for (size_t cut = 1; cut < good.size(); cut += 97) {
    const grpc::Slice slice(good.data(), good.size() - cut);
    const grpc::ByteBuffer request(&slice, 1);
    grpc::ByteBuffer response;
    grpc::ClientContext context;
    const grpc::Status status =
        grpc::internal::BlockingUnaryCall<grpc::ByteBuffer, grpc::ByteBuffer, grpc::ByteBuffer,
                                          grpc::ByteBuffer>(channel.get(), method, &context,
                                                            request, &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << cut;
  }
}

TEST_F(BadInputTest, SessionsAreOpenedOnlyAsTheContractSays) {
  const auto refuse = [this](auto change, grpc::StatusCode code,
                             const std::vector<std::string>& parts) {
    v1::OpenSessionRequest request = OpenRequest(v1::PAGE_FORMAT_PROGRESSIVE);
    change(&request);
    v1::SessionRef session;
    const grpc::Status status = TryOpen(request, &session);
    EXPECT_EQ(status.error_code(), code) << status.error_message();
    for (const std::string& part : parts) EXPECT_THAT(status.error_message(), HasSubstr(part));
  };
  const auto invalid = grpc::StatusCode::INVALID_ARGUMENT;
  using Request = v1::OpenSessionRequest;
  refuse([](Request* r) { r->clear_model(); }, invalid, {"model.num_layers", "0"});
  refuse([](Request* r) { r->mutable_model()->set_num_q_heads(5); }, invalid,
         {"model.num_q_heads", "5", "multiple"});
  refuse([](Request* r) { r->mutable_model()->set_num_q_heads(2 * 17); },
         grpc::StatusCode::UNIMPLEMENTED, {"model.num_q_heads", "16"});
  refuse([](Request* r) { r->mutable_model()->set_head_dim(100); }, grpc::StatusCode::UNIMPLEMENTED,
         {"model.head_dim", "100", "64, 80, 96, 128, 256"});
  refuse([](Request* r) { r->mutable_model()->set_softmax_scale(-1); }, invalid,
         {"model.softmax_scale", "-1"});
  refuse([](Request* r) { r->set_stored_bits(5); }, invalid, {"stored_bits", "5"});
  refuse([](Request* r) { r->set_element_type(v1::DATA_TYPE_FP8_E4M3); }, invalid,
         {"element_type", "4", "FP16 (2) or BF16 (3)"});
  refuse(
      [](Request* r) {
        r->set_page_format(v1::PAGE_FORMAT_FP32);
        r->set_element_type(v1::DATA_TYPE_BF16);
      },
      invalid, {"element_type", "3", "format's own (1)"});
  refuse([](Request* r) { r->set_page_format(static_cast<v1::PageFormat>(40)); }, invalid,
         {"page_format", "40"});
  refuse([](Request* r) { r->set_lease_seconds(-1); }, invalid, {"lease_seconds", "-1"});
  refuse([](Request* r) { r->add_key_scales(1); }, invalid, {"key_scales", "FP8"});
  refuse(
      [](Request* r) {
        for (int i = 0; i < 3; ++i) r->add_layers();
      },
      invalid, {"layers", "3 entries"});
  refuse([](Request* r) { r->add_layers()->set_window(-2); }, invalid, {"layers[0].window", "-2"});
  refuse([](Request* r) { r->set_profile("none"); }, grpc::StatusCode::NOT_FOUND, {"none"});
  refuse([](Request* r) { r->mutable_default_options()->set_theta(2); }, invalid,
         {"default_options.theta", "2"});
  refuse(
      [](Request* r) {
        r->mutable_default_options()->set_policy(v1::POLICY_ENTROPY);
        r->mutable_default_options()->set_target_relative_error(0.1f);
      },
      invalid, {"default_options.target_relative_error", "POLICY_ENTROPY"});
  refuse([](Request* r) { r->mutable_default_options()->set_policy(v1::POLICY_LEARNED); },
         UnlessOffered(v1::POLICY_LEARNED, grpc::StatusCode::FAILED_PRECONDITION),
         {Offers(v1::POLICY_LEARNED) ? "LEARNED needs a policy file" : "policy: learned"});
  refuse([](Request* r) { r->mutable_default_options()->set_mode(v1::MODE_EXACT); },
         grpc::StatusCode::FAILED_PRECONDITION, {"FULL_DEPTH"});
}

TEST_F(BadInputTest, ImportsAreCheckedChunkByChunk) {
  const v1::SessionRef session = Open(v1::PAGE_FORMAT_FP32);
  const Floats k = RandomFloats(4 * kKvRow, 1), v = RandomFloats(4 * kKvRow, 2);
  v1::ImportKvResponse response;
  v1::ImportKvRequest chunk = Chunk(session, 0, 4, k, v);
  chunk.set_num_layers(kLayers + 1);
  grpc::Status status = Import({chunk}, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("num_layers: 3"));

  chunk = Chunk(session, 0, 4, k, v);
  chunk.mutable_v()->mutable_data()->resize(17);
  status = Import({chunk}, &response);
  EXPECT_THAT(status.error_message(), HasSubstr("v.data: 17 bytes"));

  status = Import({Chunk(session, 0, 4, k, v), Chunk(session, 9, 4, k, v)}, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("position"));
  // What came before the bad chunk stands; replaying it changes nothing.
  status = Import({Chunk(session, 0, 4, k, v), Chunk(session, 4, 4, k, v)}, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.kv_len(0), 8);
  EXPECT_FALSE(Import({}, &response).ok());
}

}  // namespace
}  // namespace adaattn

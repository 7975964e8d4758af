#include <limits>

#include "kernels/policy/decision.h"
#include "tests/integration/server_fixture.h"

namespace adaattn {
namespace {

struct FormatCase {
  v1::PageFormat format;
  DType dense_type;
  double tolerance;  // relative error of o
  v1::DataType element_type = v1::DATA_TYPE_UNSPECIFIED;
};

class AttendFormatTest : public ServerFixture, public ::testing::WithParamInterface<FormatCase> {};

TEST_P(AttendFormatTest, MatchesTheReferenceAcrossPagesAndRows) {
  constexpr int64_t kTokens = 130;  // two full pages and a bit
  constexpr int kRows = 3;
  v1::OpenSessionRequest open = OpenRequest(GetParam().format);
  open.set_element_type(GetParam().element_type);
  v1::SessionRef session;
  ASSERT_TRUE(TryOpen(open, &session).ok());
  Floats k = RandomFloats(kTokens * kKvRow, 1), v = RandomFloats(kTokens * kKvRow, 2);
  ImportTokens(session, kTokens, k, v);

  const Floats q = RandomFloats(kRows * kQRow, 3);
  const Floats new_k = RandomFloats(kRows * kKvRow, 4), new_v = RandomFloats(kRows * kKvRow, 5);
  v1::AttendRequest request;
  request.set_request_id(99);
  request.set_layer(1);
  AddSequence(session, kTokens, kRows, kRows, 1, &request);
  *request.mutable_q() = F32Tensor(q, {kRows, kQHeads, kDim});
  *request.mutable_k() = F32Tensor(new_k, {kRows, kKvHeads, kDim});
  *request.mutable_v() = F32Tensor(new_v, {kRows, kKvHeads, kDim});
  request.mutable_options()->set_detail(v1::DECISION_DETAIL_PER_HEAD);
  v1::AttendResponse response;
  const grpc::Status status = Attend(request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.sequences_size(), 1);
  ASSERT_EQ(response.sequences(0).code(), 0) << response.sequences(0).message();
  EXPECT_EQ(response.request_id(), 99u);
  EXPECT_EQ(response.sequences(0).kv_len(), kTokens + kRows);
  EXPECT_FALSE(response.sequences(0).replayed());

  k.insert(k.end(), new_k.begin(), new_k.end());
  v.insert(v.end(), new_v.begin(), new_v.end());
  AttentionF64Params params;
  params.shape = {kQHeads, kKvHeads, kDim};
  params.kv_len = kTokens + kRows;
  params.q_len = kRows;
  params.q_start = kTokens;
  params.softmax_scale = 1 / std::sqrt(static_cast<double>(kDim));
  const AttentionF64Result expected = AttentionF64(params, q.data(), k.data(), v.data());
  ASSERT_EQ(response.o().shape_size(), 3);
  EXPECT_EQ(response.o().dtype(), v1::DATA_TYPE_FP32);
  EXPECT_LE(RelativeError(ReadF32(response.o()), expected.out), GetParam().tolerance);
  EXPECT_LE(RelativeError(ReadF32(response.lse()), expected.lse), GetParam().tolerance);

  // Nothing is sealed this early: every token was read once per kv head, K and V alike.
  const v1::Decision& decision = response.sequences(0).decision();
  ASSERT_EQ(decision.heads_size(), kKvHeads);
  for (const v1::HeadDecision& head : decision.heads()) {
    EXPECT_EQ(head.dense_tokens(), kTokens + kRows);
    EXPECT_EQ(head.key_bytes(), (kTokens + kRows) * kDim * DTypeBytes(GetParam().dense_type));
    EXPECT_EQ(head.value_bytes(), head.key_bytes());
  }
  EXPECT_EQ(decision.bytes_bf16(), (kTokens + kRows) * 2 * kKvRow * 2);
}

INSTANTIATE_TEST_SUITE_P(
    Formats, AttendFormatTest,
    ::testing::Values(FormatCase{v1::PAGE_FORMAT_FP32, DType::kF32, 1e-5},
                      FormatCase{v1::PAGE_FORMAT_FP16, DType::kF16, 1e-3},
                      FormatCase{v1::PAGE_FORMAT_BF16, DType::kBf16, 8e-3},
                      FormatCase{v1::PAGE_FORMAT_FP8_E4M3, DType::kF8E4m3, 0.1},
                      FormatCase{v1::PAGE_FORMAT_PROGRESSIVE, DType::kF16, 1e-3},
                      FormatCase{v1::PAGE_FORMAT_PROGRESSIVE, DType::kBf16, 8e-3,
                                 v1::DATA_TYPE_BF16}),
    [](const auto& info) {
      return v1::PageFormat_Name(info.param.format) + "_" +
             v1::DataType_Name(info.param.element_type);
    });

using AttendTest = ServerFixture;

TEST_F(AttendTest, AStepIsAppendedOnceHoweverOftenItIsAsked) {
  const v1::SessionRef session = Open(v1::PAGE_FORMAT_FP32);
  ImportTokens(session, 10, RandomFloats(10 * kKvRow, 1), RandomFloats(10 * kKvRow, 2));
  const v1::AttendRequest step = StepRequest(session, 10, 7, 100);
  v1::AttendResponse first, again;
  ASSERT_TRUE(Attend(step, &first).ok());
  ASSERT_TRUE(Attend(step, &again).ok());
  EXPECT_EQ(first.sequences(0).kv_len(), 11);
  EXPECT_EQ(again.sequences(0).kv_len(), 11);
  EXPECT_FALSE(first.sequences(0).replayed());
  EXPECT_TRUE(again.sequences(0).replayed());
  EXPECT_EQ(first.o().data(), again.o().data()) << "the same answer, bit by bit";
  EXPECT_EQ(first.lse().data(), again.lse().data());

  // Another step id at the same place, and a gap.
  for (const auto& [position, id] : {std::pair<int64_t, uint64_t>{10, 8}, {12, 8}}) {
    v1::AttendResponse refused;
    ASSERT_TRUE(Attend(StepRequest(session, position, id, 200), &refused).ok());
    EXPECT_EQ(refused.sequences(0).code(), grpc::StatusCode::FAILED_PRECONDITION);
    EXPECT_THAT(refused.sequences(0).message(), ::testing::HasSubstr("11"));
  }
}

TEST_F(AttendTest, AnEmptyCacheAnswersZeroAndMinusInfinity) {
  const v1::SessionRef session = Open(v1::PAGE_FORMAT_BF16);
  v1::AttendRequest request;
  AddSequence(session, 0, 0, 1, 0, &request)->set_q_position(5);
  *request.mutable_q() = F32Tensor(RandomFloats(kQRow, 1), {1, kQHeads, kDim});
  v1::AttendResponse response;
  const grpc::Status status = Attend(request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.sequences(0).code(), 0) << response.sequences(0).message();
  for (const float value : ReadF32(response.o())) EXPECT_EQ(value, 0);
  for (const float value : ReadF32(response.lse())) {
    EXPECT_EQ(value, -std::numeric_limits<float>::infinity());
  }
}

// 1536 tokens: the basis is fitted on the first 1024, then pages are sealed.
class SealedTest : public ServerFixture {
 protected:
  static constexpr int64_t kTokens = 1536;

  v1::SessionRef OpenSealed() {
    v1::SessionRef session = Open(v1::PAGE_FORMAT_PROGRESSIVE);
    k_ = RandomFloats(kTokens * kKvRow, 1);
    v_ = RandomFloats(kTokens * kKvRow, 2);
    ImportTokens(session, kTokens, k_, v_);
    server_->engine()->Quiesce();
    return session;
  }
  v1::AttendRequest Query(const v1::SessionRef& session, v1::Mode mode) const {
    v1::AttendRequest request;
    AddSequence(session, kTokens, 0, 1, 0, &request);
    *request.mutable_q() = F32Tensor(q_, {1, kQHeads, kDim});
    request.mutable_options()->set_mode(mode);
    request.mutable_options()->set_detail(v1::DECISION_DETAIL_PER_HEAD);
    return request;
  }
  AttentionF64Result Expected() const {
    AttentionF64Params params;
    params.shape = {kQHeads, kKvHeads, kDim};
    params.kv_len = kTokens;
    params.q_len = 1;
    params.q_start = kTokens - 1;
    params.softmax_scale = 1 / std::sqrt(static_cast<double>(kDim));
    return AttentionF64(params, q_.data(), k_.data(), v_.data());
  }

  Floats k_, v_;
  const Floats q_ = RandomFloats(kQRow, 3);
};

TEST_F(SealedTest, SealedPagesAnswerInEveryMode) {
  const v1::SessionRef session = OpenSealed();
  const AttentionF64Result expected = Expected();
  for (const auto& [mode, tolerance] : {std::pair<v1::Mode, double>{v1::MODE_FULL_DEPTH, 0.02},
                                        {v1::MODE_STATISTICAL, 0.1},
                                        {v1::MODE_STATIC, 0.02}}) {
    v1::AttendResponse response;
    const grpc::Status status = Attend(Query(session, mode), &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    ASSERT_EQ(response.sequences(0).code(), 0) << response.sequences(0).message();
    EXPECT_GT(response.sequences(0).decision().pages_sealed(), 0) << v1::Mode_Name(mode);
    EXPECT_LE(RelativeError(ReadF32(response.o()), expected.out), tolerance) << v1::Mode_Name(mode);
  }
  v1::AttendResponse exact;
  ASSERT_TRUE(Attend(Query(session, v1::MODE_EXACT), &exact).ok());
  EXPECT_EQ(exact.sequences(0).code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(exact.sequences(0).message(), ::testing::HasSubstr("FULL_DEPTH"));
}

TEST_F(SealedTest, BytesFollowFromThePageCountsAndAreThoseOfTheMetrics) {
  const v1::SessionRef session = OpenSealed();
  auto before = Samples();
  int64_t key_bytes = 0, value_bytes = 0, basis_bytes = 0, bf16_bytes = 0, skipped = 0;
  for (const v1::Mode mode : {v1::MODE_FULL_DEPTH, v1::MODE_STATISTICAL, v1::MODE_STATIC}) {
    v1::AttendResponse response;
    ASSERT_TRUE(Attend(Query(session, mode), &response).ok());
    const v1::Decision& decision = response.sequences(0).decision();
    int64_t bytes_read = 0;
    for (const v1::HeadDecision& head : decision.heads()) {
      HeadDecision counts{};
      for (const v1::KeyPageCount& pages : head.key_pages()) {
        counts.key_pages[KeyDepthIndex(pages.bits(), ChunksForRank(kDim, pages.rank()))] +=
            pages.pages();
      }
      for (const v1::ValuePageCount& pages : head.value_pages()) {
        counts.value_pages[pages.bits() / 2] += pages.pages();
      }
      counts.dense_tokens = static_cast<int32_t>(head.dense_tokens());
      const ReadBytes recounted = RecountBytes(counts, kDim, DType::kBf16);
      EXPECT_EQ(head.key_bytes(), recounted.key) << v1::Mode_Name(mode);
      EXPECT_EQ(head.value_bytes(), recounted.value) << v1::Mode_Name(mode);
      key_bytes += head.key_bytes();
      value_bytes += head.value_bytes();
      bytes_read += head.key_bytes() + head.value_bytes();
      skipped += counts.value_pages[0];
    }
    EXPECT_EQ(decision.bytes_read(), bytes_read);
    basis_bytes += decision.basis_bytes();
    bf16_bytes += decision.bytes_bf16();
  }
  server_->engine()->Quiesce();  // The last batch is recorded.
  auto after = Samples();
  const auto grown = [&](const std::string& name) { return after.at(name) - before.at(name); };
  const std::string read = "adaattn_kv_bytes_read_total{backend=\"" + TestBackend() + "\",tensor=";
  EXPECT_EQ(grown(read + "\"key\"}"), key_bytes);
  EXPECT_EQ(grown(read + "\"value\"}"), value_bytes);
  EXPECT_EQ(grown(read + "\"basis\"}"), basis_bytes);
  EXPECT_EQ(grown("adaattn_kv_bytes_baseline_total{format=\"bf16\"}"), bf16_bytes);
  EXPECT_EQ(grown("adaattn_pages_skipped_total"), skipped);
  EXPECT_EQ(grown("adaattn_sequences_total{status=\"OK\"}"), 3);
  EXPECT_EQ(grown("adaattn_requests_total{code=\"OK\",method=\"Attend\"}"), 3);
  EXPECT_GT(after.at("adaattn_pages_sealed_total"), 0);
}

TEST_F(SealedTest, ForkTruncateAndExportKeepTheTokens) {
  const v1::SessionRef session = OpenSealed();
  v1::ForkSessionRequest fork;
  *fork.mutable_session() = session;
  fork.set_count(2);
  v1::ForkSessionResponse branches;
  grpc::ClientContext fork_context;
  ASSERT_TRUE(stub_->ForkSession(&fork_context, fork, &branches).ok());
  ASSERT_EQ(branches.sessions_size(), 2);
  v1::AttendResponse original, branch;
  ASSERT_TRUE(Attend(Query(session, v1::MODE_FULL_DEPTH), &original).ok());
  ASSERT_TRUE(Attend(Query(branches.sessions(1), v1::MODE_FULL_DEPTH), &branch).ok());
  EXPECT_EQ(original.o().data(), branch.o().data());

  v1::TruncateSessionRequest truncate;
  *truncate.mutable_session() = branches.sessions(0);
  truncate.set_position(100);
  v1::TruncateSessionResponse truncated;
  grpc::ClientContext truncate_context;
  ASSERT_TRUE(stub_->TruncateSession(&truncate_context, truncate, &truncated).ok());
  EXPECT_EQ(truncated.kv_len(), 100);
  EXPECT_EQ(truncated.pages_reopened(), kLayers);

  v1::ExportKvRequest request;
  *request.mutable_session() = branches.sessions(0);
  grpc::ClientContext export_context;
  auto reader = stub_->ExportKv(&export_context, request);
  v1::ExportKvResponse chunk;
  std::vector<Floats> k(kLayers);
  while (reader->Read(&chunk)) {
    const Floats part = ReadF32(chunk.k());
    Floats& all = k[static_cast<size_t>(chunk.layer())];
    EXPECT_EQ(chunk.position(), static_cast<int64_t>(all.size()) / kKvRow);
    all.insert(all.end(), part.begin(), part.end());
  }
  ASSERT_TRUE(reader->Finish().ok());
  const std::vector<double> expected(k_.begin(), k_.begin() + 100 * kKvRow);
  for (const Floats& layer : k) EXPECT_LE(RelativeError(layer, expected), 0.02);
}

}  // namespace
}  // namespace adaattn

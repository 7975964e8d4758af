// Policies over the wire: each answers, each is counted, and the learned one finds its weights.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "integration/server_fixture.h"
#include "kernels/policy/feedback.h"
#include "kernels/policy/theta.h"
#include "kernels/reference/attention_f64.h"

namespace adaattn {
namespace {

using ::testing::HasSubstr;

// A model that gives theta = 2^log_theta whatever it sees.
std::string ConstantPolicy(int log_theta, int version = 1) {
  std::string features;
  for (const char* name : kThetaFeatureNames) {
    features += (features.empty() ? "\"" : ", \"") + std::string(name) + "\"";
  }
  return R"({"format": "adaattn-policy", "version": )" + std::to_string(version) +
         R"(, "features": [)" + features + R"(], "weights": [)" + std::to_string(log_theta) +
         ", 0, 0, 0, 0, 0, 0, 0]}";
}

class PolicyServerTest : public ServerFixture {
 protected:
  static constexpr int64_t kTokens = 1536;

  ServerOptions Options() const override {
    ServerOptions options = ServerFixture::Options();
    options.policy_file = dir_.File("policy.json");
    std::ofstream(options.policy_file) << ConstantPolicy(-7);
    return options;
  }

  void OpenSealed(const v1::OpenSessionRequest& request, v1::SessionRef* session) {
    const grpc::Status status = TryOpen(request, session);
    ASSERT_TRUE(status.ok()) << status.error_message();
    ASSERT_NO_FATAL_FAILURE(ImportTokens(*session, kTokens, k_, v_));
    server_->engine()->Quiesce();
  }
  v1::AttendRequest Query(const v1::SessionRef& session, v1::Policy policy) const {
    v1::AttendRequest request;
    AddSequence(session, kTokens, 0, 1, 0, &request);
    *request.mutable_q() = F32Tensor(q_, {1, kQHeads, kDim});
    request.mutable_options()->set_policy(policy);
    request.mutable_options()->set_detail(v1::DECISION_DETAIL_PER_HEAD);
    return request;
  }
  void Decide(const v1::AttendRequest& request, v1::Decision* decision) {
    v1::AttendResponse response;
    const grpc::Status status = Attend(request, &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    ASSERT_EQ(response.sequences(0).code(), 0) << response.sequences(0).message();
    AttentionF64Params params;
    params.shape = {kQHeads, kKvHeads, kDim};
    params.kv_len = kTokens;
    params.q_len = 1;
    params.q_start = kTokens - 1;
    params.softmax_scale = 1 / std::sqrt(static_cast<double>(kDim));
    const auto expected = AttentionF64(params, q_.data(), k_.data(), v_.data()).out;
    EXPECT_LT(RelativeError(ReadF32(response.o()), expected), 0.6);
    *decision = response.sequences(0).decision();
  }

  const Floats k_ = RandomFloats(kTokens * kKvRow, 1), v_ = RandomFloats(kTokens * kKvRow, 2);
  const Floats q_ = RandomFloats(kQRow, 3);
};

TEST_F(PolicyServerTest, EveryPolicyAnswersAndIsCounted) {
  v1::SessionRef session;
  ASSERT_NO_FATAL_FAILURE(OpenSealed(OpenRequest(v1::PAGE_FORMAT_PROGRESSIVE), &session));
  auto before = Samples();
  v1::AttendRequest request = Query(session, v1::POLICY_THRESHOLD);
  request.mutable_options()->set_theta(0.01f);
  v1::Decision decision;
  ASSERT_NO_FATAL_FAILURE(Decide(request, &decision));
  for (const v1::HeadDecision& head : decision.heads()) EXPECT_EQ(head.theta(), 0.01f);

  ASSERT_NO_FATAL_FAILURE(Decide(Query(session, v1::POLICY_BUDGET), &decision));
  EXPECT_FLOAT_EQ(decision.effective_target(), 0.05f);

  std::vector<std::string> answered = {"threshold", "budget"};
  if (Offers(v1::POLICY_ENTROPY)) {
    request = Query(session, v1::POLICY_ENTROPY);
    request.mutable_options()->set_theta(0.1f);
    ASSERT_NO_FATAL_FAILURE(Decide(request, &decision));
    // Random keys spread the mass over all 24 pages, or nearly.
    for (const v1::HeadDecision& head : decision.heads()) {
      EXPECT_GT(head.theta(), 0.1f / 24);
      EXPECT_LT(head.theta(), 0.1f / 12);
    }
    EXPECT_EQ(decision.effective_target(), 0);
    answered.push_back("entropy");
  }
  if (Offers(v1::POLICY_LEARNED)) {
    request = Query(session, v1::POLICY_LEARNED);
    request.mutable_options()->set_target_relative_error(0.2f);
    ASSERT_NO_FATAL_FAILURE(Decide(request, &decision));
    for (const v1::HeadDecision& head : decision.heads()) EXPECT_FLOAT_EQ(head.theta(), 1.0f / 128);
    EXPECT_FLOAT_EQ(decision.effective_target(), 0.2f);
    answered.push_back("learned");
  }

  server_->engine()->Quiesce();  // The last batch is recorded.
  auto after = Samples();
  for (const std::string& policy : answered) {
    const std::string name = "adaattn_head_policies_total{policy=\"" + policy + "\"}";
    EXPECT_EQ(after.at(name) - before.at(name), kKvHeads) << policy;
  }
}

// The first step chooses as a budget does; each one after it by what was predicted for the one
// before. A fork goes on where its session stood.
TEST_F(PolicyServerTest, FeedbackFollowsThePredictedErrors) {
  constexpr float kTarget = 0.5f;
  v1::SessionRef session;
  ASSERT_NO_FATAL_FAILURE(OpenSealed(OpenRequest(v1::PAGE_FORMAT_PROGRESSIVE), &session));
  const auto decide = [&](const v1::SessionRef& of, v1::Policy policy, v1::Decision* decision) {
    v1::AttendRequest request = Query(of, policy);
    request.mutable_options()->set_target_relative_error(kTarget);
    ASSERT_NO_FATAL_FAILURE(Decide(request, decision));
    ASSERT_EQ(decision->heads_size(), kKvHeads);
    EXPECT_EQ(decision->effective_target(), kTarget);
  };
  v1::Decision before, now;
  ASSERT_NO_FATAL_FAILURE(decide(session, v1::POLICY_BUDGET, &before));
  ASSERT_NO_FATAL_FAILURE(decide(session, v1::POLICY_FEEDBACK, &now));
  for (int head = 0; head < kKvHeads; ++head) {
    EXPECT_GT(now.heads(head).theta(), 0);
    EXPECT_EQ(now.heads(head).theta(), before.heads(head).theta());
  }
  for (int step = 0; step < 3; ++step) {
    before = now;
    ASSERT_NO_FATAL_FAILURE(decide(session, v1::POLICY_FEEDBACK, &now));
    for (int head = 0; head < kKvHeads; ++head) {
      const float next =
          NextTheta(before.heads(head).theta(), before.heads(head).predicted_error(), kTarget);
      EXPECT_NEAR(now.heads(head).theta(), next, 1e-5 * next) << "step " << step;
      EXPECT_NE(now.heads(head).theta(), before.heads(head).theta());
    }
  }
  v1::ForkSessionRequest fork;
  *fork.mutable_session() = session;
  v1::ForkSessionResponse forked;
  grpc::ClientContext context;
  const grpc::Status status = stub_->ForkSession(&context, fork, &forked);
  ASSERT_TRUE(status.ok()) << status.error_message();
  v1::Decision here, there;
  ASSERT_NO_FATAL_FAILURE(decide(session, v1::POLICY_FEEDBACK, &here));
  ASSERT_NO_FATAL_FAILURE(decide(forked.sessions(0), v1::POLICY_FEEDBACK, &there));
  EXPECT_EQ(there.theta(), here.theta());

  server_->engine()->Quiesce();
  EXPECT_GE(Samples().at("adaattn_head_policies_total{policy=\"feedback\"}"), 6 * kKvHeads);
}

TEST_F(PolicyServerTest, APolicyThatIsNotOfferedIsRefusedByName) {
  v1::SessionRef session;
  ASSERT_NO_FATAL_FAILURE(OpenSealed(OpenRequest(v1::PAGE_FORMAT_PROGRESSIVE), &session));
  for (const v1::Policy policy : {v1::POLICY_ENTROPY, v1::POLICY_LEARNED}) {
    v1::AttendResponse response;
    const grpc::Status status = Attend(Query(session, policy), &response);
    EXPECT_EQ(status.error_code(),
              Offers(policy) ? grpc::StatusCode::OK : grpc::StatusCode::UNIMPLEMENTED)
        << v1::Policy_Name(policy) << ": " << status.error_message();
  }
}

TEST_F(PolicyServerTest, AProfileBringsItsOwnPolicy) {
  v1::UploadProfileRequest profile;
  profile.set_name("tuned");
  v1::OpenSessionRequest open = OpenRequest(v1::PAGE_FORMAT_PROGRESSIVE);
  *profile.mutable_model() = open.model();
  profile.set_policy_json(ConstantPolicy(-9));
  v1::UploadProfileResponse uploaded;
  grpc::ClientContext context;
  const grpc::Status status = stub_->UploadProfile(&context, profile, &uploaded);
  ASSERT_TRUE(status.ok()) << status.error_message();
  open.set_profile("tuned");
  open.mutable_default_options()->set_policy(v1::POLICY_LEARNED);
  v1::SessionRef session;
  if (Offers(v1::POLICY_LEARNED)) {
    ASSERT_NO_FATAL_FAILURE(OpenSealed(open, &session));
    v1::Decision decision;
    ASSERT_NO_FATAL_FAILURE(Decide(Query(session, v1::POLICY_UNSPECIFIED), &decision));
    for (const v1::HeadDecision& head : decision.heads()) EXPECT_FLOAT_EQ(head.theta(), 1.0f / 512);
  } else {
    EXPECT_EQ(TryOpen(open, &session).error_code(), grpc::StatusCode::UNIMPLEMENTED);
  }

  // One that extends it has it, too.
  v1::UploadProfileRequest more;
  more.set_name("more");
  more.set_extends("tuned");
  *more.mutable_model() = open.model();
  v1::GetProfileRequest get;
  get.set_name("more");
  v1::GetProfileResponse found;
  grpc::ClientContext extending, getting;
  ASSERT_TRUE(stub_->UploadProfile(&extending, more, &uploaded).ok());
  ASSERT_TRUE(stub_->GetProfile(&getting, get, &found).ok());
  EXPECT_TRUE(found.has_policy());

  profile.set_policy_json(ConstantPolicy(-9, /*version=*/2));
  grpc::ClientContext again;
  const grpc::Status refused = stub_->UploadProfile(&again, profile, &uploaded);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(refused.error_message(), HasSubstr("policy_json: policy file: version: 2"));
}

TEST_F(PolicyServerTest, AServerWithABadPolicyFileDoesNotStart) {
  ServerOptions options = Options();
  std::ofstream(options.policy_file) << ConstantPolicy(-9, 3);
  const absl::Status status = Server::Start(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("version: 3"));
}

// Caches that are degenerate: every policy still answers, and where the answer is plain it is
// right.
class DegenerateCacheTest : public PolicyServerTest {
 protected:
  void Fill(Floats k, Floats v) {
    keys_ = std::move(k);
    values_ = std::move(v);
    ASSERT_TRUE(TryOpen(OpenRequest(v1::PAGE_FORMAT_PROGRESSIVE), &session_).ok());
    ASSERT_NO_FATAL_FAILURE(ImportTokens(session_, kTokens, keys_, values_));
    server_->engine()->Quiesce();
  }
  // Of pure noise, flat attention leaves next to nothing to be relative to. The mean is no
  // constant: that would be one channel after the Hadamard transform, whose rounding adds up
  // (kernels/policy/error_model.h).
  static Floats ValuesWithAMean() {
    const Floats mean = RandomFloats(kKvRow, 11);
    Floats v = RandomFloats(kTokens * kKvRow, 8);
    for (size_t i = 0; i < v.size(); ++i) v[i] += mean[i % kKvRow];
    return v;
  }
  // Largest relative error over the policies that the server offers against float64 over the same
  // tokens; infinity where one does not answer.
  double WorstError(const Floats& q) {
    AttentionF64Params params;
    params.shape = {kQHeads, kKvHeads, kDim};
    params.kv_len = kTokens;
    params.q_len = 1;
    params.q_start = kTokens - 1;
    params.softmax_scale = 1 / std::sqrt(static_cast<double>(kDim));
    const auto expected = AttentionF64(params, q.data(), keys_.data(), values_.data()).out;
    double worst = 0;
    for (const v1::Policy policy :
         {v1::POLICY_THRESHOLD, v1::POLICY_BUDGET, v1::POLICY_ENTROPY, v1::POLICY_LEARNED,
          v1::POLICY_FEEDBACK, v1::POLICY_FEEDBACK}) {  // by a budget, and by what that left
      if (!Offers(policy)) continue;
      v1::AttendRequest request = Query(session_, policy);
      *request.mutable_q() = F32Tensor(q, {1, kQHeads, kDim});
      v1::AttendResponse response;
      const grpc::Status status = Attend(request, &response);
      EXPECT_TRUE(status.ok()) << status.error_message();
      if (!status.ok()) return std::numeric_limits<double>::infinity();
      EXPECT_EQ(response.sequences(0).code(), 0) << response.sequences(0).message();
      const v1::Decision& decision = response.sequences(0).decision();
      EXPECT_GT(decision.pages_sealed(), 0);
      EXPECT_TRUE(std::isfinite(decision.predicted_error()) && decision.predicted_error() <= 1);
      EXPECT_TRUE(std::isfinite(decision.entropy()) && decision.entropy() >= 0);
      const double error = RelativeError(ReadF32(response.o()), expected);
      EXPECT_FALSE(std::isnan(error)) << v1::Policy_Name(policy);
      worst = std::max(worst, error);
    }
    return worst;
  }

  v1::SessionRef session_;
  Floats keys_, values_;
};

// One key for every token: no covariance at all, and perfectly flat attention.
TEST_F(DegenerateCacheTest, IdenticalKeysGiveTheMeanOfTheValues) {
  const Floats row = RandomFloats(kKvRow, 7);
  Floats k;
  for (int64_t t = 0; t < kTokens; ++t) k.insert(k.end(), row.begin(), row.end());
  ASSERT_NO_FATAL_FAILURE(Fill(std::move(k), ValuesWithAMean()));
  EXPECT_LT(WorstError(q_), 0.05) << "the default target";
}

TEST_F(DegenerateCacheTest, KeysOfZerosAreAsGood) {
  ASSERT_NO_FATAL_FAILURE(Fill(Floats(kTokens * kKvRow, 0.0f), ValuesWithAMean()));
  EXPECT_LT(WorstError(q_), 0.05) << "the default target";
}

// Keys in a plane of two directions: the covariance has two eigenvalues and zeros.
TEST_F(DegenerateCacheTest, ASingularCovarianceFitsABasis) {
  const Floats a = RandomFloats(kKvRow, 5), b = RandomFloats(kKvRow, 6);
  const Floats weights = RandomFloats(2 * kTokens, 9);
  Floats k;
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int i = 0; i < kKvRow; ++i) {
      k.push_back(weights[2 * t] * a[i] + weights[2 * t + 1] * b[i]);
    }
  }
  ASSERT_NO_FATAL_FAILURE(Fill(std::move(k), ValuesWithAMean()));
  EXPECT_LT(WorstError(q_), 0.15);
}

TEST_F(DegenerateCacheTest, OneGiantChannelDrownsNoOther) {
  Floats k = k_;
  for (size_t i = 7; i < k.size(); i += kDim) k[i] = 3e3f + k[i];
  Floats q = q_;
  for (size_t i = 7; i < q.size(); i += kDim) q[i] = 1e-3f;
  ASSERT_NO_FATAL_FAILURE(Fill(std::move(k), ValuesWithAMean()));
  EXPECT_LT(WorstError(q), 0.15);
}

// The query of every head looks at one sealed token in the middle and at nothing else.
TEST_F(DegenerateCacheTest, AllMassOnOneTokenIsThatToken) {
  Floats k = k_, q(kQRow);
  for (int i = 0; i < kKvRow; ++i) k[700 * kKvRow + i] = 12 * (i % 2 == 0 ? 1.0f : -1.0f);
  for (int i = 0; i < kQRow; ++i) q[i] = 4 * (i % 2 == 0 ? 1.0f : -1.0f);
  ASSERT_NO_FATAL_FAILURE(Fill(std::move(k), v_));
  EXPECT_LT(WorstError(q), 0.05);
}

TEST_F(DegenerateCacheTest, ABasisWithNanIsRefused) {
  v1::UploadProfileRequest profile;
  profile.set_name("bad");
  *profile.mutable_model() = OpenRequest(v1::PAGE_FORMAT_PROGRESSIVE).model();
  Floats basis(kLayers * kKvRow * kDim, 0.0f);
  basis[5] = std::numeric_limits<float>::quiet_NaN();
  *profile.mutable_basis_mean() = F32Tensor(Floats(kLayers * kKvRow), {kLayers, kKvHeads, kDim});
  *profile.mutable_basis() = F32Tensor(basis, {kLayers, kKvHeads, kDim, kDim});
  v1::UploadProfileResponse uploaded;
  grpc::ClientContext context;
  const grpc::Status status = stub_->UploadProfile(&context, profile, &uploaded);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("basis.data: element 5 is nan"));
}

}  // namespace
}  // namespace adaattn

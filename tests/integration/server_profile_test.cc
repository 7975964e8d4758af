// Profiles over the wire: the bases they bring, and the error factors that audits of their sessions
// give.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "integration/server_fixture.h"
#include "kernels/policy/error_factor.h"

namespace adaattn {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class ProfileServerTest : public ServerFixture {
 protected:
  static constexpr int64_t kTokens = 1536;
  static constexpr int kSteps = 12;

  ServerOptions Options() const override {
    ServerOptions options = ServerFixture::Options();
    options.engine.audit_share = 1;
    return options;
  }

  static v1::UploadProfileRequest Profile(const std::string& name,
                                          const std::vector<float>& error_factors = {}) {
    v1::UploadProfileRequest profile;
    profile.set_name(name);
    *profile.mutable_model() = OpenRequest(v1::PAGE_FORMAT_PROGRESSIVE).model();
    profile.mutable_error_factors()->Assign(error_factors.begin(), error_factors.end());
    return profile;
  }
  // The channels themselves.
  static void BringBasis(v1::UploadProfileRequest* profile) {
    Floats identity;
    for (int matrix = 0; matrix < kLayers * kKvHeads; ++matrix) {
      for (int i = 0; i < kDim * kDim; ++i) identity.push_back(i % (kDim + 1) == 0 ? 1.0f : 0.0f);
    }
    *profile->mutable_basis_mean() = F32Tensor(Floats(kLayers * kKvRow), {kLayers, kKvHeads, kDim});
    *profile->mutable_basis() = F32Tensor(identity, {kLayers, kKvHeads, kDim, kDim});
  }
  grpc::Status TryUpload(const v1::UploadProfileRequest& profile, int64_t* bytes = nullptr) {
    grpc::ClientContext context;
    v1::UploadProfileResponse uploaded;
    grpc::Status status = stub_->UploadProfile(&context, profile, &uploaded);
    if (bytes != nullptr) *bytes = uploaded.bytes();
    return status;
  }
  void Upload(const v1::UploadProfileRequest& profile, int64_t* bytes = nullptr) {
    const grpc::Status status = TryUpload(profile, bytes);
    ASSERT_TRUE(status.ok()) << status.error_message();
  }
  grpc::Status TryGet(const std::string& name, v1::GetProfileResponse* profile) {
    grpc::ClientContext context;
    v1::GetProfileRequest request;
    request.set_name(name);
    return stub_->GetProfile(&context, request, profile);
  }
  v1::GetProfileResponse Get(const std::string& name) {
    v1::GetProfileResponse profile;
    const grpc::Status status = TryGet(name, &profile);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return profile;
  }

  // All pages sealed that are due.
  v1::SessionRef OpenSealed(const std::string& profile) {
    v1::OpenSessionRequest open = OpenRequest(v1::PAGE_FORMAT_PROGRESSIVE);
    open.set_profile(profile);
    open.set_exact_tier(v1::EXACT_TIER_BF16_PAGES);
    v1::SessionRef session;
    const grpc::Status status = TryOpen(open, &session);
    EXPECT_TRUE(status.ok()) << status.error_message();
    ImportTokens(session, kTokens, RandomFloats(kTokens * kKvRow, 1),
                 RandomFloats(kTokens * kKvRow, 2));
    server_->engine()->Quiesce();
    return session;
  }
  // The error that a prediction p, E / sqrt(|o|^2 + E^2), is of: E / |o|.
  static double ErrorOf(double p) { return p / std::sqrt(1 - p * p); }

  // A query of layer 0 that appends nothing.
  v1::Decision Decide(const v1::SessionRef& session, v1::Policy policy, uint32_t seed,
                      Floats* o = nullptr, float target = 0.3f) {
    v1::AttendRequest request;
    AddSequence(session, kTokens, 0, 1, 0, &request);
    *request.mutable_q() = F32Tensor(RandomFloats(kQRow, seed), {1, kQHeads, kDim});
    v1::AttendOptions* options = request.mutable_options();
    options->set_policy(policy);
    if (policy == v1::POLICY_THRESHOLD) options->set_theta(0.02f);
    if (policy == v1::POLICY_BUDGET) options->set_target_relative_error(target);
    options->set_detail(v1::DECISION_DETAIL_PER_HEAD);
    v1::AttendResponse response;
    const grpc::Status status = Attend(request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    if (o != nullptr) *o = ReadF32(response.o());
    return response.sequences(0).decision();
  }
};

TEST_F(ProfileServerTest, AuditsOfItsSessionsGiveErrorFactors) {
  ASSERT_NO_FATAL_FAILURE(Upload(Profile("model")));
  const v1::GetProfileResponse fresh = Get("model");
  EXPECT_EQ(fresh.model().num_layers(), kLayers);
  EXPECT_FALSE(fresh.has_basis());
  EXPECT_FALSE(fresh.has_policy());
  EXPECT_THAT(fresh.audits(), ElementsAre(0, 0, 0, 0));
  EXPECT_THAT(fresh.error_factors(), ElementsAre(1, 1, 1, 1));
  EXPECT_THAT(fresh.audited_error_factors(), Each(1.0f));

  const v1::SessionRef session = OpenSealed("model");
  for (int i = 0; i < kSteps; ++i) Decide(session, v1::POLICY_BUDGET, 10 + i);
  server_->engine()->Quiesce();
  const v1::GetProfileResponse audited = Get("model");
  EXPECT_THAT(audited.audits(), ElementsAre(kSteps, kSteps, 0, 0)) << "steps were of layer 0";
  EXPECT_THAT(audited.error_factors(), Each(1.0f)) << "nothing changes by itself";
  for (int head = 0; head < kKvHeads; ++head) {
    EXPECT_NE(audited.audited_error_factors(head), 1) << head;
    EXPECT_EQ(audited.audited_error_factors(kKvHeads + head), 1) << head;
  }

  // Other policies' predictions are no budget's, nor are those of sessions without the profile.
  for (int i = 0; i < kSteps; ++i) Decide(session, v1::POLICY_THRESHOLD, 10 + i);
  // Nor is a budget that nothing meets.
  EXPECT_EQ(Decide(session, v1::POLICY_BUDGET, 10, nullptr, 0.01f).fallback(),
            v1::FALLBACK_REASON_BUDGET);
  ASSERT_NO_FATAL_FAILURE(Upload(Profile("other")));
  Decide(OpenSealed("other"), v1::POLICY_BUDGET, 10);
  server_->engine()->Quiesce();
  EXPECT_THAT(Get("model").audits(), ElementsAre(kSteps, kSteps, 0, 0));
  EXPECT_THAT(Get("other").audits(), ElementsAre(1, 1, 0, 0));

  // Audits are of the factors that they were made with.
  ASSERT_NO_FATAL_FAILURE(Upload(Profile("model", {2, 2, 2, 2})));
  EXPECT_THAT(Get("model").audits(), Each(0));
  EXPECT_THAT(Get("model").audited_error_factors(), Each(2.0f));
}

TEST_F(ProfileServerTest, ErrorFactorsMultiplyPredictionsAndTheBudgetFollows) {
  ASSERT_NO_FATAL_FAILURE(Upload(Profile("plain")));
  ASSERT_NO_FATAL_FAILURE(Upload(Profile("scaled", {2, 0.25f, 1, 1})));
  EXPECT_THAT(Get("scaled").error_factors(), ElementsAre(2, 0.25f, 1, 1));
  const v1::SessionRef plain = OpenSealed("plain"), scaled = OpenSealed("scaled");
  Floats o, same;
  const v1::Decision before = Decide(plain, v1::POLICY_THRESHOLD, 5, &o);
  const v1::Decision after = Decide(scaled, v1::POLICY_THRESHOLD, 5, &same);
  EXPECT_EQ(o, same) << "a threshold asks for no prediction";
  ASSERT_EQ(after.heads_size(), kKvHeads);
  for (int head = 0; head < kKvHeads; ++head) {
    const double ratio = ErrorOf(after.heads(head).predicted_error()) /
                         ErrorOf(before.heads(head).predicted_error());
    EXPECT_NEAR(std::log2(ratio), head == 0 ? 1 : -2, 0.25) << head;
  }
  const v1::Decision chosen = Decide(plain, v1::POLICY_BUDGET, 5);
  const v1::Decision corrected = Decide(scaled, v1::POLICY_BUDGET, 5);
  EXPECT_LT(corrected.heads(0).theta(), chosen.heads(0).theta());
  EXPECT_GT(corrected.heads(1).theta(), chosen.heads(1).theta());
}

TEST_F(ProfileServerTest, ABroughtBasisTakesTheFactorsToo) {
  std::vector<double> errors;
  for (const float factor : {1.0f, 2.0f}) {
    v1::UploadProfileRequest profile = Profile("identity", std::vector<float>(4, factor));
    BringBasis(&profile);
    int64_t bytes = 0;
    ASSERT_NO_FATAL_FAILURE(Upload(profile, &bytes));
    EXPECT_EQ(bytes, 4 * (kLayers * kKvRow + kLayers * kKvRow * kDim) +
                         kLayers * kKvHeads * static_cast<int64_t>(4 + sizeof(PredictionAudits)));
    EXPECT_EQ(Get("identity").bytes(), bytes);
    EXPECT_TRUE(Get("identity").has_basis());
    const v1::Decision decision = Decide(OpenSealed("identity"), v1::POLICY_THRESHOLD, 5);
    errors.push_back(ErrorOf(decision.heads(0).predicted_error()));
  }
  EXPECT_NEAR(errors[1] / errors[0], 2, 0.3);
}

TEST_F(ProfileServerTest, AProfileExtendsAnother) {
  v1::UploadProfileRequest first = Profile("first", {2, 2, 2, 2});
  first.mutable_key_scales()->Resize(kLayers * kKvHeads, 0.5f);
  BringBasis(&first);
  int64_t bytes = 0, extended = 0;
  ASSERT_NO_FATAL_FAILURE(Upload(first, &bytes));
  Decide(OpenSealed("first"), v1::POLICY_BUDGET, 10);
  server_->engine()->Quiesce();
  EXPECT_THAT(Get("first").audits(), ElementsAre(1, 1, 0, 0));

  // Nothing of its own: the same, but for audits.
  v1::UploadProfileRequest second = Profile("second");
  second.set_extends("first");
  ASSERT_NO_FATAL_FAILURE(Upload(second, &extended));
  EXPECT_EQ(extended, bytes);
  EXPECT_TRUE(Get("second").has_basis());
  EXPECT_THAT(Get("second").error_factors(), Each(2.0f));
  EXPECT_THAT(Get("second").audits(), Each(0));
  // What audits say in the place of what was there; itself.
  v1::UploadProfileRequest next = Profile("first", {1, 3, 2, 2});
  next.set_extends("first");
  ASSERT_NO_FATAL_FAILURE(Upload(next, &extended));
  EXPECT_EQ(extended, bytes);
  EXPECT_THAT(Get("first").error_factors(), ElementsAre(1, 3, 2, 2));
  EXPECT_THAT(Get("first").audits(), Each(0));

  next.set_extends("nobody");
  const grpc::Status unknown = TryUpload(next);
  EXPECT_EQ(unknown.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(unknown.error_message(), HasSubstr("extends: \"nobody\" was not uploaded"));
  next.set_extends("first");
  next.mutable_model()->set_num_layers(kLayers + 1);
  next.clear_error_factors();
  const grpc::Status other = TryUpload(next);
  EXPECT_EQ(other.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(other.error_message(), HasSubstr("extends: first"));
}

TEST_F(ProfileServerTest, BadFactorsAreRefusedByName) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const std::pair<std::vector<float>, const char*> cases[] = {
      {{1, 1, 1}, "error_factors: 3 factors is not allowed; it must be none or 4"},
      {{1, 1, 1, kNan}, "error_factors: nan"},
      {{1, 1, -1, 1}, "error_factors: -1"},
      {{1, 0.1f, 1, 1}, "error_factors: 0.1 is not allowed; it must be from 0.125 to 8"},
      {{1, 1, 1, 9}, "error_factors: 9 is not allowed; it must be from 0.125 to 8"}};
  for (const auto& [factors, words] : cases) {
    const grpc::Status status = TryUpload(Profile("bad", factors));
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << words;
    EXPECT_THAT(status.error_message(), HasSubstr(words));
  }
  v1::GetProfileResponse profile;
  const grpc::Status unknown = TryGet("bad", &profile);
  EXPECT_EQ(unknown.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(unknown.error_message(), HasSubstr("name: \"bad\" was not uploaded"));
}

}  // namespace
}  // namespace adaattn

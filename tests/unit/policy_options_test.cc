#include "server/policy_options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/step.h"

namespace adaattn {
namespace {

using ::testing::HasSubstr;

class PolicyOptionsTest : public ::testing::Test {
 protected:
  PolicyOptionsTest() {
    backend_.name = "device";
    context_.options = &options_;
    context_.backend = &backend_;
  }
  // What a progressive session that was opened with `defaults` resolves a message to.
  absl::StatusOr<ResolvedOptions> Resolve(AttendOptions defaults, const AttendOptions& message = {},
                                          const ModelProfile* profile = nullptr) {
    FillServerDefaults(context_, profile, &defaults);
    return ResolveOptions(message, defaults, PageFormat::kProgressive, false, 64);
  }

  ServerOptions options_;
  BackendInfo backend_;
  ValidationContext context_;
};

TEST_F(PolicyOptionsTest, RefusesPoliciesThatTheDeviceLacks) {
  v1::AttendOptions options;
  options.set_policy(v1::POLICY_ENTROPY);
  const absl::Status status = CheckPolicyFields(options, "options", backend_);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(status.message(), HasSubstr("options.policy: entropy is not supported by device"));
  EXPECT_THAT(status.message(), HasSubstr("threshold, budget"));
  backend_.policies.push_back(Policy::kEntropy);
  EXPECT_TRUE(CheckPolicyFields(options, "options", backend_).ok());
}

TEST_F(PolicyOptionsTest, TheServersDefaultsFillWhatSessionsLeaveOpen) {
  auto resolved = Resolve({});
  ASSERT_TRUE(resolved.ok());
  EXPECT_EQ(resolved->decision.policy, Policy::kBudget);
  EXPECT_EQ(resolved->decision.target_relative_error, 0.05f);
  EXPECT_EQ(resolved->max_relative_error, 0);

  options_.default_policy.name = "entropy";
  options_.default_policy.theta = 0.2f;
  resolved = Resolve({});
  EXPECT_EQ(resolved->decision.policy, Policy::kEntropy);
  EXPECT_EQ(resolved->decision.theta, 0.2f);

  options_.default_policy.name = "static";
  options_.default_policy.static_key_bits = 6;
  options_.default_policy.static_rank = 32;
  options_.default_policy.static_value_bits = 4;
  resolved = Resolve({});
  EXPECT_EQ(resolved->mode, AttendMode::kStatic);
  EXPECT_EQ(resolved->decision.policy, Policy::kStatic);
  EXPECT_EQ(resolved->decision.static_key_bits, 6);
  EXPECT_EQ(resolved->decision.static_rank, 32);
  EXPECT_EQ(resolved->decision.static_value_bits, 4);

  options_.default_policy.name = "full_depth";
  EXPECT_EQ(Resolve({})->decision.policy, Policy::kFullDepth);
}

TEST_F(PolicyOptionsTest, SessionsAndMessagesGoBeforeTheServer) {
  options_.default_policy.name = "threshold";
  options_.default_policy.theta = 0.1f;
  options_.default_policy.target_relative_error = 0.02f;
  options_.default_policy.max_relative_error = 0.2f;
  AttendOptions session;
  session.policy = Policy::kBudget;
  auto resolved = Resolve(session);
  EXPECT_EQ(resolved->decision.policy, Policy::kBudget);
  EXPECT_EQ(resolved->decision.target_relative_error, 0.02f);
  EXPECT_EQ(resolved->max_relative_error, 0.2f);
  session.target_relative_error = 0.5f;
  EXPECT_EQ(Resolve(session)->max_relative_error, 0.5f) << "never below the session's own target";
  AttendOptions message;
  message.policy = Policy::kEntropy;
  resolved = Resolve(session, message);
  EXPECT_EQ(resolved->decision.policy, Policy::kEntropy);
  EXPECT_EQ(resolved->decision.theta, kDefaultEntropyTheta);
}

TEST_F(PolicyOptionsTest, AThetaCountsForItsPolicyOnly) {
  AttendOptions session;
  session.policy = Policy::kThreshold;
  session.theta = 0.001f;
  AttendOptions message;
  EXPECT_EQ(Resolve(session, message)->decision.theta, 0.001f);
  message.policy = Policy::kEntropy;
  EXPECT_EQ(Resolve(session, message)->decision.theta, kDefaultEntropyTheta);
  message.theta = 0.5f;
  EXPECT_EQ(Resolve(session, message)->decision.theta, 0.5f);
}

TEST_F(PolicyOptionsTest, FeedbackAimsAtAnErrorAndScansOnce) {
  AttendOptions session;
  session.policy = Policy::kThreshold;
  session.theta = 0.001f;
  EXPECT_EQ(Resolve(session)->decision.coarse_rank, 32);
  AttendOptions message;
  message.policy = Policy::kFeedback;
  message.target_relative_error = 0.1f;
  const auto resolved = Resolve(session, message);
  ASSERT_TRUE(resolved.ok());
  EXPECT_EQ(resolved->decision.policy, Policy::kFeedback);
  EXPECT_EQ(resolved->decision.target_relative_error, 0.1f);
  EXPECT_EQ(resolved->decision.coarse_rank, 0);
  message.coarse_rank = 16;
  EXPECT_EQ(Resolve(session, message)->decision.coarse_rank, 16);
  v1::AttendOptions options;
  options.set_policy(v1::POLICY_FEEDBACK);
  options.set_target_relative_error(0.1f);
  EXPECT_TRUE(CheckPolicyFields(options, "options", backend_).ok());
  options.set_theta(0.01f);
  EXPECT_EQ(CheckPolicyFields(options, "options", backend_).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(PolicyOptionsTest, LearnedNeedsAModelAndTheProfilesGoesFirst) {
  AttendOptions session;
  session.policy = Policy::kLearned;
  EXPECT_EQ(Resolve(session).status().code(), absl::StatusCode::kFailedPrecondition);
  ThetaModel of_server, of_profile;
  of_server.weights[0] = 1;
  of_profile.weights[0] = 2;
  context_.theta_model = &of_server;
  EXPECT_EQ(Resolve(session)->decision.theta_model.weights[0], 1);
  ModelProfile profile;
  EXPECT_EQ(Resolve(session, {}, &profile)->decision.theta_model.weights[0], 1);
  profile.theta_model = of_profile;
  EXPECT_EQ(Resolve(session, {}, &profile)->decision.theta_model.weights[0], 2);
}

}  // namespace
}  // namespace adaattn

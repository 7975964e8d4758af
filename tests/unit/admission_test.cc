#include "server/admission.h"

#include <gtest/gtest.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace adaattn {
namespace {

AdmissionOptions SmallLimits() {
  AdmissionOptions options;
  options.max_client_inflight_bytes = 100;
  options.max_inflight_bytes = 150;
  options.max_client_streams = 2;
  return options;
}

TEST(AdmissionTest, LimitsTheBytesOfOneClient) {
  Admission admission(SmallLimits());
  absl::StatusOr<AdmissionTicket> first = admission.AdmitBytes("a", 80);
  ASSERT_TRUE(first.ok());
  const absl::Status refused = admission.AdmitBytes("a", 30).status();
  EXPECT_TRUE(absl::IsResourceExhausted(refused));
  EXPECT_TRUE(absl::StrContains(refused.message(), "at most 100")) << refused;
  EXPECT_EQ(admission.inflight_bytes(), 80);
  *first = AdmissionTicket();
  EXPECT_EQ(admission.inflight_bytes(), 0);
  EXPECT_TRUE(admission.AdmitBytes("a", 100).ok());
}

TEST(AdmissionTest, LimitsTheBytesOfAll) {
  Admission admission(SmallLimits());
  const auto first = admission.AdmitBytes("a", 100);
  const auto second = admission.AdmitBytes("b", 60);
  ASSERT_TRUE(first.ok());
  EXPECT_TRUE(absl::IsResourceExhausted(second.status()));
  EXPECT_TRUE(admission.AdmitBytes("b", 50).ok());
}

TEST(AdmissionTest, LimitsTheStreamsOfOneClient) {
  Admission admission(SmallLimits());
  auto first = admission.AdmitStream("a");
  const auto second = admission.AdmitStream("a");
  ASSERT_TRUE(second.ok());
  EXPECT_TRUE(absl::IsResourceExhausted(admission.AdmitStream("a").status()));
  EXPECT_TRUE(admission.AdmitStream("b").ok());
  *first = AdmissionTicket();
  EXPECT_TRUE(admission.AdmitStream("a").ok());
}

TEST(AdmissionTest, RefusesEverythingWhileDraining) {
  Admission admission(SmallLimits());
  admission.StartDraining();
  EXPECT_TRUE(absl::IsUnavailable(admission.AdmitBytes("a", 1).status()));
  EXPECT_TRUE(absl::IsUnavailable(admission.AdmitStream("a").status()));
}

TEST(AdmissionTest, ManyPassingClientsDoNotLoseTheOneThatStays) {
  Admission admission(SmallLimits());
  const auto stays = admission.AdmitBytes("stays", 90);
  for (int i = 0; i < 1000; ++i) {
    ASSERT_TRUE(admission.AdmitBytes(absl::StrCat("passes-", i), 1).ok());
  }
  EXPECT_TRUE(absl::IsResourceExhausted(admission.AdmitBytes("stays", 20).status()));
}

}  // namespace
}  // namespace adaattn

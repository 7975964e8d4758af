#include "server/session_table.h"

#include <gtest/gtest.h>

#include <set>

#include "absl/strings/match.h"
#include "tests/unit/engine_harness.h"
#include "tests/unit/fake_clock.h"

namespace adaattn {
namespace {

constexpr char kInstance[] = "00000000000000aa";

class SessionTableTest : public testing::Test {
 protected:
  SessionTableTest() : table_(Options(), &clock_) {}

  static SessionTableOptions Options() {
    SessionTableOptions options;
    options.instance = kInstance;
    options.max_sessions = 4;
    options.max_tenant_sessions = 3;
    options.remembered_expiries = 2;
    return options;
  }
  static SessionConfig Config(const std::string& tenant = "tenant-a") {
    SessionConfig config = TestConfig(PageFormat::kBf16);
    config.tenant = tenant;
    return config;
  }

  FakeClock clock_;
  SessionTable table_;
};

TEST_F(SessionTableTest, FindsWhatWasOpened) {
  const std::shared_ptr<Session> session = *table_.Open(Config());
  const auto found = table_.Find(session->id(), session->epoch(), "tenant-a");
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(*found, session);
  EXPECT_EQ(table_.size(), 1);
}

TEST_F(SessionTableTest, IdsEmbedRouteInstanceAndEpoch) {
  const std::shared_ptr<Session> session = *table_.Open(Config());
  const absl::StatusOr<SessionId> id = ParseSessionId(session->id());
  ASSERT_TRUE(id.ok()) << id.status();
  EXPECT_EQ(id->routing_key, "route");
  EXPECT_EQ(id->instance, kInstance);
  EXPECT_EQ(id->epoch, session->epoch());
}

TEST_F(SessionTableTest, UnknownIdsAreNotFound) {
  const std::shared_ptr<Session> session = *table_.Open(Config());
  SessionId id = *ParseSessionId(session->id());
  id.token ^= 1;
  EXPECT_TRUE(absl::IsNotFound(table_.Find(id.ToString(), 1, "tenant-a").status()));
  EXPECT_TRUE(absl::IsInvalidArgument(table_.Find("nonsense", 1, "tenant-a").status()));
}

TEST_F(SessionTableTest, IdsOfAnotherInstanceAreLost) {
  const std::shared_ptr<Session> session = *table_.Open(Config());
  SessionId id = *ParseSessionId(session->id());
  id.instance = "00000000000000bb";
  const absl::Status status = table_.Find(id.ToString(), 1, "tenant-a").status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_TRUE(absl::StrContains(status.message(), "session lost")) << status;
}

TEST_F(SessionTableTest, OtherEpochsAreLost) {
  const std::shared_ptr<Session> session = *table_.Open(Config());
  const absl::Status status = table_.Find(session->id(), 0, "tenant-a").status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_TRUE(absl::StrContains(status.message(), "session lost")) << status;
}

TEST_F(SessionTableTest, AnotherTenantsSessionIsDenied) {
  const std::shared_ptr<Session> session = *table_.Open(Config());
  EXPECT_TRUE(absl::IsPermissionDenied(table_.Find(session->id(), 1, "tenant-b").status()));
  EXPECT_TRUE(absl::IsPermissionDenied(table_.Remove(session->id(), 1, "tenant-b").status()));
}

TEST_F(SessionTableTest, LeasesEndWithoutCalls) {
  const std::shared_ptr<Session> session = *table_.Open(Config());
  clock_.Advance(absl::Seconds(59));
  EXPECT_TRUE(table_.Find(session->id(), 1, "tenant-a").ok());
  clock_.Advance(absl::Seconds(59));
  EXPECT_TRUE(table_.RemoveExpired().empty());
  clock_.Advance(absl::Seconds(2));
  absl::Status status = table_.Find(session->id(), 1, "tenant-a").status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_EQ(table_.RemoveExpired().size(), 1u);
  EXPECT_TRUE(session->closed());
  status = table_.Find(session->id(), 1, "tenant-a").status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "expired after 1m")) << status;
}

TEST_F(SessionTableTest, SessionsWithTasksDoNotExpire) {
  const std::shared_ptr<Session> session = *table_.Open(Config());
  session->TaskBegins();
  clock_.Advance(absl::Seconds(61));
  EXPECT_TRUE(table_.RemoveExpired().empty());
  EXPECT_TRUE(table_.Find(session->id(), 1, "tenant-a").ok());
  session->TaskEnds();
}

TEST_F(SessionTableTest, RemembersOnlySoManyExpiries) {
  std::vector<std::string> ids;
  ids.reserve(3);
  for (int i = 0; i < 3; ++i) ids.push_back((*table_.Open(Config()))->id());
  clock_.Advance(absl::Seconds(61));
  EXPECT_EQ(table_.RemoveExpired().size(), 3u);
  int forgotten = 0;
  for (const std::string& id : ids) {
    forgotten += absl::IsNotFound(table_.Find(id, 1, "tenant-a").status()) ? 1 : 0;
  }
  EXPECT_EQ(forgotten, 1);
}

TEST_F(SessionTableTest, RemovingTwiceIsFine) {
  const std::shared_ptr<Session> session = *table_.Open(Config());
  EXPECT_EQ(*table_.Remove(session->id(), 1, "tenant-a"), session);
  EXPECT_TRUE(session->closed());
  const auto again = table_.Remove(session->id(), 1, "tenant-a");
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(*again, nullptr);
  EXPECT_TRUE(absl::IsNotFound(table_.Find(session->id(), 1, "tenant-a").status()));
}

TEST_F(SessionTableTest, LimitsSessionsPerTenantAndInAll) {
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(table_.Open(Config()).ok());
  absl::Status status = table_.Open(Config()).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  EXPECT_TRUE(absl::StrContains(status.message(), "the tenant holds its limit of 3")) << status;
  ASSERT_TRUE(table_.Open(Config("tenant-b")).ok());
  status = table_.Open(Config("tenant-b")).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  EXPECT_TRUE(absl::StrContains(status.message(), "its limit of 4")) << status;
}

TEST_F(SessionTableTest, ListsTheTenantsOwnInPages) {
  std::set<std::string> ids;
  for (int i = 0; i < 3; ++i) ids.insert((*table_.Open(Config()))->id());
  ASSERT_TRUE(table_.Open(Config("tenant-b")).ok());
  const auto first = table_.List("tenant-a", "", 2);
  ASSERT_EQ(first.size(), 2u);
  const auto rest = table_.List("tenant-a", first.back()->id(), 2);
  ASSERT_EQ(rest.size(), 1u);
  EXPECT_EQ(ids, (std::set<std::string>{first[0]->id(), first[1]->id(), rest[0]->id()}));
}

}  // namespace
}  // namespace adaattn

#include "server/session_id.h"

#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace adaattn {
namespace {

TEST(SessionIdTest, SurvivesItsSpelling) {
  const SessionId id{"team-7.model_x", "0123456789abcdef", 42, 0xdeadbeef};
  const absl::StatusOr<SessionId> parsed = ParseSessionId(id.ToString());
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->routing_key, id.routing_key);
  EXPECT_EQ(parsed->instance, id.instance);
  EXPECT_EQ(parsed->epoch, id.epoch);
  EXPECT_EQ(parsed->token, id.token);
}

TEST(SessionIdTest, RefusesEverySpellingThatNoServerMakes) {
  for (const char* text :
       {"", "~", "~~~", "a~b~1", "a~b~1~00000000000000001", "a~b~1~000000000000000g",
        "a~b~01~0000000000000001", "a~b~+1~0000000000000001", "a~b~1~000000000000000A",
        "a b~c~1~0000000000000001", "a~~1~0000000000000001", "a~b~1~0000000000000001~"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(ParseSessionId(text).status())) << text;
  }
  EXPECT_TRUE(ParseSessionId("a~b~1~0000000000000001").ok());
  EXPECT_FALSE(ParseSessionId(std::string(100000, 'a')).ok());
}

TEST(SessionIdTest, RoutingKeysAreShortAndPlain) {
  EXPECT_TRUE(IsValidRoutingKey("A-z.0_9"));
  EXPECT_TRUE(IsValidRoutingKey(std::string(64, 'k')));
  EXPECT_FALSE(IsValidRoutingKey(std::string(65, 'k')));
  EXPECT_FALSE(IsValidRoutingKey(""));
  EXPECT_FALSE(IsValidRoutingKey("a~b"));
  EXPECT_FALSE(IsValidRoutingKey("\xc3\xa4"));
}

TEST(SessionIdTest, InstancesDiffer) {
  EXPECT_NE(MakeInstanceName(), MakeInstanceName());
  EXPECT_TRUE(IsValidRoutingKey(MakeInstanceName()));
}

}  // namespace
}  // namespace adaattn

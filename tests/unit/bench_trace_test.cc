#include "loadtest/bench_trace.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "loadtest/row_judge.h"

namespace adaattn {
namespace {

constexpr char kSmall[] = "data/smollm2-135m-layer15-8k.safetensors";  // 9 q over 3 kv heads, 64
constexpr char kLarge[] = "data/qwen25-coder-1.5b-layer14-8k.safetensors";  // 12 over 2, 128

// Every element says where it is: 1000 head + 10 vector + channel, v and answers likewise.
Trace NumberedTrace(const AttentionShape& shape) {
  Trace trace;
  trace.shape = shape;
  trace.softmax_scale = 0.5;
  trace.num_tokens = 3;
  trace.num_rows = 2;
  trace.positions = {1, 2};
  const auto fill = [&](int32_t heads, int32_t vectors, std::vector<uint16_t>* to) {
    for (int32_t head = 0; head < heads; ++head) {
      for (int32_t i = 0; i < vectors; ++i) {
        for (int32_t c = 0; c < shape.head_dim; ++c) {
          to->push_back(static_cast<uint16_t>(1000 * head + 10 * i + c));
        }
      }
    }
  };
  fill(shape.num_q_heads, 2, &trace.q);
  fill(shape.num_kv_heads, 3, &trace.k);
  fill(shape.num_kv_heads, 3, &trace.v);
  trace.expected_o.resize(trace.q.size());
  return trace;
}

TEST(JoinHeadsTest, PutsTwoHeadsSideBySide) {
  const auto joined = JoinHeads(NumberedTrace({6, 3, 2}));
  ASSERT_TRUE(joined.ok()) << joined.status();
  EXPECT_TRUE(joined->shape == (AttentionShape{2, 1, 4})) << "the third kv head has no partner";
  EXPECT_DOUBLE_EQ(joined->softmax_scale, 0.5 / std::sqrt(2.0));
  EXPECT_EQ(joined->num_tokens, 3);
  EXPECT_EQ(joined->num_rows, 2);
  EXPECT_THAT(joined->positions, testing::ElementsAre(1, 2));
  EXPECT_THAT(joined->q, testing::ElementsAre(0, 1, 2000, 2001, 10, 11, 2010, 2011,  //
                                              1000, 1001, 3000, 3001, 1010, 1011, 3010, 3011));
  EXPECT_THAT(joined->k, testing::ElementsAre(0, 1, 1000, 1001, 10, 11, 1010, 1011,  //
                                              20, 21, 1020, 1021));
  EXPECT_EQ(joined->v, joined->k);
  EXPECT_TRUE(joined->expected_o.empty());
}

TEST(JoinHeadsTest, NeedsTwoKvHeads) {
  const auto joined = JoinHeads(NumberedTrace({4, 1, 2}));
  EXPECT_EQ(joined.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(joined.status().message()), testing::HasSubstr("the trace has 1"));
}

TEST(RepeatHeadsTest, TakesHeadsAndTheirGroupsInTurn) {
  const Trace trace = NumberedTrace({4, 2, 2});
  const Trace repeated = RepeatHeads(trace, {6, 3, 2});
  ASSERT_EQ(repeated.k.size(), 3u * 3 * 2);
  ASSERT_EQ(repeated.q.size(), 6u * 2 * 2);
  std::vector<int32_t> kv_heads, q_heads;
  for (size_t i = 0; i < repeated.k.size(); i += 6) kv_heads.push_back(repeated.k[i] / 1000);
  for (size_t i = 0; i < repeated.q.size(); i += 4) q_heads.push_back(repeated.q[i] / 1000);
  EXPECT_THAT(kv_heads, testing::ElementsAre(0, 1, 0));
  EXPECT_THAT(q_heads, testing::ElementsAre(0, 1, 2, 3, 0, 1));
  EXPECT_EQ(repeated.v, repeated.k);
}

TEST(BenchTraceTest, JoinsACapture) {
  const auto trace = LoadBenchTrace(std::string("joined:") + kLarge);
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_TRUE(trace->shape == (AttentionShape{6, 1, 256}));
  // All that judges it is computed.
  RowJudge judge(&*trace);
  const auto answers = judge.Judge({{trace->num_rows - 1, 5, trace->num_tokens}});
  EXPECT_EQ(answers[0]->out.size(), 256u);
  EXPECT_GT(answers[0]->fp8_error, 1e-3);
  EXPECT_LT(answers[0]->fp8_error, 0.5);
}

TEST(BenchTraceTest, NamesWhatItCannotLoad) {
  const auto missing = LoadBenchTrace("joined:data/none.safetensors");
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(LoadBenchTrace("random:8").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(LoadBenchTrace("random:16").ok());
  EXPECT_TRUE(LoadBenchTrace(kSmall).ok());
}

TEST(BenchTraceTest, ReportsTellTracesApart) {
  EXPECT_EQ(BenchTraceName("tests/data/a.safetensors"), "a.safetensors");
  EXPECT_EQ(BenchTraceName("joined:tests/data/a.safetensors"), "joined:a.safetensors");
  EXPECT_EQ(BenchTraceName("joined:a.safetensors"), "joined:a.safetensors");
  EXPECT_EQ(BenchTraceName("random:64"), "random:64");
}

}  // namespace
}  // namespace adaattn

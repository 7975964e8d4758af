#include "loadtest/row_judge.h"

#include <gtest/gtest.h>

#include <set>
#include <tuple>

#include "client/trace.h"

namespace adaattn {
namespace {

const Trace& SmallTrace() {
  static const Trace* const trace = [] {
    auto loaded = LoadTrace("data/smollm2-135m-layer15-8k.safetensors");
    return new Trace(loaded.ok() ? *std::move(loaded) : Trace());
  }();
  return *trace;
}

TEST(RowJudgeTest, AgreesWithTheAnswersOfTheTrace) {
  const Trace& trace = SmallTrace();
  ASSERT_GT(trace.num_rows, 0);
  RowJudge judge(&trace);
  std::vector<TraceRow> rows;
  for (const int32_t row : {0, 17, trace.num_rows - 1}) {
    for (const int32_t head : {0, trace.shape.num_q_heads - 1}) {
      rows.push_back({row, head, trace.positions[row] + 1});
    }
  }
  const auto answers = judge.Judge(rows);
  ASSERT_EQ(answers.size(), rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t at =
        (int64_t{rows[i].q_head} * trace.num_rows + rows[i].row) * trace.shape.head_dim;
    EXPECT_LT(RelativeError(trace.expected_o.data() + at, answers[i]->out), 1e-6) << i;
    EXPECT_GT(answers[i]->fp8_error, 1e-3) << i;
    EXPECT_LT(answers[i]->fp8_error, 0.5) << i;
  }
  EXPECT_EQ(judge.Judge({rows[2]})[0], answers[2]);  // kept, not computed again
}

TEST(RowJudgeTest, MeasuresRelativeErrors) {
  const float out[] = {3.0f, 4.5f};
  EXPECT_DOUBLE_EQ(RelativeError(out, {3.0, 4.0}), 0.1);
}

TEST(RowJudgeTest, DrawsHeadsInTurnFromTheirOwnGroup) {
  const Trace& trace = SmallTrace();  // 9 q heads over 3 kv heads
  ASSERT_GT(trace.num_rows, 0);
  const AttentionShape shape{32, 8, 64};
  std::set<int32_t> used;
  for (int32_t q_head = 0; q_head < 32; ++q_head) {
    const TraceRow row = SourceRow(trace, shape, 16384, 0, q_head);
    EXPECT_EQ(row.q_head / 3, SourceKvHead(trace, q_head / 4)) << q_head;
    EXPECT_EQ(row.num_tokens, 8192);
    EXPECT_EQ(row.row, trace.num_rows - 1);
    used.insert(row.q_head);
  }
  EXPECT_EQ(used.size(), 9u);
  EXPECT_NE(SourceRow(trace, shape, 8192, 0, 5).q_head, SourceRow(trace, shape, 8192, 1, 5).q_head);
}

TEST(RowJudgeTest, TakesTheRowsNearestToTheEnd) {
  const Trace& trace = SmallTrace();
  ASSERT_GT(trace.num_rows, 0);
  const AttentionShape shape{32, 8, 64};
  for (int32_t sequence = 0; sequence < 8; ++sequence) {
    EXPECT_EQ(SourceRow(trace, shape, 8192, sequence, 0).row, trace.num_rows - 1 - sequence);
    EXPECT_EQ(SourceRow(trace, shape, 2048, sequence, 0).row, sequence);
  }
  EXPECT_EQ(SourceRow(trace, shape, 2048, 0, 0).num_tokens, 2048);
}

}  // namespace
}  // namespace adaattn

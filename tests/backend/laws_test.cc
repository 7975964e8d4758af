// What must hold whatever the numbers are: independence of batch, page ids, threads and splits,
// poisoned neighbours, flags.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "tests/backend/backend_harness.h"

namespace adaattn {
namespace {

HarnessOptions Options(PageFormat format) {
  HarnessOptions options;
  options.shape = {6, 2, 64};
  options.format = format;
  options.num_pages = 96;
  return options;
}

// 600 tokens; progressive: six of them sealed pages.
TestSequence MakeSequence(BackendHarness* harness) {
  TestSequence sequence = harness->NewSequence(600);
  if (IsProgressive(harness->options().format)) harness->Seal(&sequence, 6, 6);
  return sequence;
}

StepCase Attend(TestSequence* sequence, const std::vector<float>& q, int32_t q_len = 1) {
  StepCase step;
  step.sequence = sequence;
  step.q_len = q_len;
  step.q = q;
  step.decision.theta = 0.05f;
  return step;
}

// Another batch: bit for bit, but that the cuda backend cuts a head's sealed pages by what else is
// in the batch, which moves FP32 roundings.
void ExpectSameInAnotherBatch(BackendHarness* harness, const StepOutput& a, const StepOutput& b) {
  if (harness->backend().info().name != "cuda" || !IsProgressive(harness->options().format)) {
    EXPECT_EQ(a.out, b.out);
    EXPECT_EQ(a.lse, b.lse);
    return;
  }
  constexpr double kRoundings = 2e-6;
  const size_t d = static_cast<size_t>(harness->options().shape.head_dim);
  ASSERT_EQ(a.out.size(), b.out.size());
  for (size_t row = 0; row < a.lse.size(); ++row) {
    double error = 0, norm = 0;
    for (size_t i = row * d; i < (row + 1) * d; ++i) {
      error += std::pow(double{a.out[i]} - b.out[i], 2);
      norm += std::pow(double{a.out[i]}, 2);
    }
    EXPECT_LE(std::sqrt(error), kRoundings * std::sqrt(norm)) << "row " << row;
    EXPECT_NEAR(a.lse[row], b.lse[row], kRoundings) << "row " << row;
  }
}

void ExpectSameDecision(const HeadDecision& a, const HeadDecision& b) {
  int32_t sealed = 0;
  for (int i = 0; i < kNumKeyDepths; ++i) EXPECT_EQ(a.key_pages[i], b.key_pages[i]) << i;
  for (int i = 0; i < kNumValueDepths; ++i) {
    EXPECT_EQ(a.value_pages[i], b.value_pages[i]) << i;
    sealed += a.value_pages[i];
  }
  EXPECT_EQ(a.dense_tokens, b.dense_tokens);
  EXPECT_EQ(a.theta, b.theta);
  // Rows over dense pages alone add theirs up as they end.
  EXPECT_NEAR(a.entropy, b.entropy, sealed > 0 ? 0.0 : 2e-5);
  EXPECT_EQ(a.predicted_error, b.predicted_error);
  EXPECT_EQ(a.key_bytes, b.key_bytes);
  EXPECT_EQ(a.value_bytes, b.value_bytes);
  EXPECT_EQ(a.basis_bytes, b.basis_bytes);
}

class LawsTest : public ::testing::TestWithParam<PageFormat> {};

TEST_P(LawsTest, SequenceAloneEqualsItselfInABatch) {
  BackendHarness harness(Options(GetParam()));
  ASSERT_TRUE(harness.ok());
  TestSequence first = MakeSequence(&harness), second = MakeSequence(&harness);
  TestSequence third = MakeSequence(&harness);
  const std::vector<float> q = harness.RandomRows(1, 6);
  const StepOutput alone = harness.Run({Attend(&second, q)})[0];
  const StepOutput batched =
      harness.Run({Attend(&first, {}), Attend(&second, q), Attend(&third, {})})[1];
  ExpectSameInAnotherBatch(&harness, alone, batched);
}

// So many heads that on a device a CTA merges all columns of one, of which some sequences have
// fewer.
TEST(BatchLawTest, SequencesOfManyHeadsMayHaveDifferentQLen) {
  HarnessOptions options = Options(PageFormat::kProgressive);
  options.shape = {96, 48, 64};
  options.num_pages = 48;
  BackendHarness harness(options);
  ASSERT_TRUE(harness.ok());
  TestSequence first = MakeSequence(&harness), second = MakeSequence(&harness);
  TestSequence third = MakeSequence(&harness);
  const std::vector<StepCase> batch = {Attend(&first, harness.RandomRows(1, 96), 1),
                                       Attend(&second, harness.RandomRows(2, 96), 2),
                                       Attend(&third, harness.RandomRows(1, 96), 1)};
  const std::vector<StepOutput> batched = harness.Run(batch);
  for (size_t i = 0; i < batch.size(); ++i) {
    SCOPED_TRACE("sequence " + std::to_string(i));
    ExpectSameInAnotherBatch(&harness, harness.Run({batch[i]})[0], batched[i]);
  }
}

TEST_P(LawsTest, TheSameBatchAgainGivesTheSameBits) {
  BackendHarness harness(Options(GetParam()));
  ASSERT_TRUE(harness.ok());
  TestSequence first = MakeSequence(&harness), second = MakeSequence(&harness);
  TestSequence third = harness.NewSequence(130);
  std::vector<StepCase> batch = {Attend(&first, harness.RandomRows(1, 6)),
                                 Attend(&second, harness.RandomRows(4, 6), 4),
                                 Attend(&third, harness.RandomRows(1, 6))};
  if (harness.Supports(Policy::kBudget)) {
    batch[0].decision.policy = Policy::kBudget;
    batch[0].decision.target_relative_error = 0.05f;
  }
  const std::vector<StepOutput> expected = harness.Run(batch);
  for (int repeat = 0; repeat < 20; ++repeat) {
    harness.Run({batch[2]});  // whose traces in the workspace must not matter
    const std::vector<StepOutput> again = harness.Run(batch);
    for (size_t i = 0; i < batch.size(); ++i) {
      SCOPED_TRACE("repeat " + std::to_string(repeat) + " sequence " + std::to_string(i));
      EXPECT_EQ(again[i].out, expected[i].out);
      EXPECT_EQ(again[i].lse, expected[i].lse);
      ASSERT_EQ(again[i].decisions.size(), expected[i].decisions.size());
      for (size_t head = 0; head < expected[i].decisions.size(); ++head) {
        ExpectSameDecision(again[i].decisions[head], expected[i].decisions[head]);
      }
    }
  }
}

TEST_P(LawsTest, MovingPagesChangesNoBit) {
  std::vector<StepOutput> outputs;
  for (const int skipped_pages : {0, 17}) {
    HarnessOptions options = Options(GetParam());
    options.shuffle = false;  // the random tokens stay the same, only their places change
    BackendHarness harness(options);
    ASSERT_TRUE(harness.ok());
    for (int i = 0; i < skipped_pages; ++i) harness.NewPage();
    TestSequence sequence = MakeSequence(&harness);
    outputs.push_back(harness.Run({Attend(&sequence, {})})[0]);
  }
  EXPECT_EQ(outputs[0].out, outputs[1].out);
  EXPECT_EQ(outputs[0].lse, outputs[1].lse);
}

TEST_P(LawsTest, ThreadsChangeNoBit) {
  std::vector<StepOutput> outputs;
  for (const int32_t threads : {1, 2, 5}) {
    HarnessOptions options = Options(GetParam());
    options.num_threads = threads;
    BackendHarness harness(options);
    ASSERT_TRUE(harness.ok());
    TestSequence sequence = MakeSequence(&harness);
    StepCase step = Attend(&sequence, {});
    step.q_len = 4;
    outputs.push_back(harness.Run({step})[0]);
  }
  EXPECT_EQ(outputs[0].out, outputs[1].out);
  EXPECT_EQ(outputs[0].out, outputs[2].out);
  EXPECT_EQ(outputs[0].lse, outputs[2].lse);
}

TEST_P(LawsTest, NonfiniteValuesAreFlaggedAndLeaveOthersAlone) {
  BackendHarness harness(Options(GetParam()));
  ASSERT_TRUE(harness.ok());
  TestSequence good = MakeSequence(&harness), bad = MakeSequence(&harness);
  const std::vector<float> q = harness.RandomRows(1, 6);
  const StepOutput expected = harness.Run({Attend(&good, q)})[0];
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    StepCase bad_q = Attend(&bad, harness.RandomRows(1, 6));
    bad_q.q[77] = poison;
    std::vector<StepOutput> outputs = harness.Run({bad_q, Attend(&good, q)});
    EXPECT_TRUE(outputs[0].result.nonfinite_q);
    EXPECT_FALSE(outputs[0].result.nonfinite_kv);
    EXPECT_FALSE(outputs[1].result.nonfinite_q);
    ExpectSameInAnotherBatch(&harness, outputs[1], expected);
    for (const bool in_keys : {true, false}) {
      StepCase bad_kv = Attend(&bad, {});
      bad_kv.append_len = 1;
      bad_kv.k = harness.RandomRows(1, 2);
      bad_kv.v = harness.RandomRows(1, 2);
      (in_keys ? bad_kv.k : bad_kv.v)[99] = poison;
      outputs = harness.Run({bad_kv, Attend(&good, q)});
      EXPECT_TRUE(outputs[0].result.nonfinite_kv);
      EXPECT_FALSE(outputs[0].result.nonfinite_q);
      EXPECT_FALSE(outputs[1].result.nonfinite_kv);
      ExpectSameInAnotherBatch(&harness, outputs[1], expected);
    }
  }
  // The rows that were written and not counted are gone after the next append.
  StepCase next = Attend(&bad, {});
  next.append_len = 1;
  const StepOutput output = harness.Run({next})[0];
  EXPECT_FALSE(output.result.nonfinite_kv);
  for (const float value : output.out) EXPECT_TRUE(std::isfinite(value));
}

TEST_P(LawsTest, OnlyTheSequenceOfANonfiniteRowIsFlagged) {
  BackendHarness harness(Options(GetParam()));
  ASSERT_TRUE(harness.ok());
  const int32_t q_lens[] = {2, 0, 1, 3, 1};
  std::vector<TestSequence> sequences;
  for (const int32_t q_len : q_lens) sequences.push_back(harness.NewSequence(70 + q_len));
  for (size_t bad = 0; bad < sequences.size(); ++bad) {
    for (int32_t row = 0; row < q_lens[bad]; ++row) {
      std::vector<StepCase> batch;
      for (size_t i = 0; i < sequences.size(); ++i) {
        batch.push_back(Attend(&sequences[i], harness.RandomRows(q_lens[i], 6)));
        batch.back().q_len = q_lens[i];
        batch.back().append_len = q_lens[i] == 0 ? 1 : 0;
      }
      const size_t row_size = batch[bad].q.size() / q_lens[bad];
      for (const size_t at : {row_size * row, row_size * (row + 1) - 1}) {
        std::vector<StepCase> poisoned = batch;
        poisoned[bad].q[at] = std::numeric_limits<float>::quiet_NaN();
        const std::vector<StepOutput> outputs = harness.Run(poisoned);
        for (size_t i = 0; i < sequences.size(); ++i) {
          EXPECT_EQ(outputs[i].result.nonfinite_q, i == bad) << i << ", row " << row;
          EXPECT_FALSE(outputs[i].result.nonfinite_kv);
        }
      }
    }
  }
}

TEST_P(LawsTest, ValuesBeyondFp16PagesAreFlaggedAndNothingElseIs) {
  BackendHarness harness(Options(GetParam()));
  ASSERT_TRUE(harness.ok());
  const bool narrow = DenseDType(GetParam()) == DType::kF16;
  for (const bool in_keys : {true, false}) {
    for (const float value : {65504.0f, -65504.0f, 65505.0f, -70000.0f, 1e30f}) {
      TestSequence sequence = harness.NewSequence(70);
      StepCase step = Attend(&sequence, {});
      step.append_len = 1;
      step.k = harness.RandomRows(1, 2);
      step.v = harness.RandomRows(1, 2);
      (in_keys ? step.k : step.v)[99] = value;
      EXPECT_EQ(harness.Run({step})[0].result.nonfinite_kv, narrow && std::abs(value) > 65504)
          << value;
    }
  }
  TestSequence sequence = harness.NewSequence(70);
  StepCase step = Attend(&sequence, harness.RandomRows(1, 6));
  step.q[5] = 70000;
  EXPECT_FALSE(harness.Run({step})[0].result.nonfinite_q);
}

TEST_P(LawsTest, AppendingInPiecesEqualsAppendingAtOnce) {
  std::vector<StepOutput> outputs;
  for (const std::vector<int>& pieces :
       std::vector<std::vector<int>>{{200}, {1, 62, 2, 64, 71}, {63, 1, 65, 71}}) {
    BackendHarness harness(Options(GetParam()));
    ASSERT_TRUE(harness.ok());
    const std::vector<float> k = harness.RandomRows(200, 2), v = harness.RandomRows(200, 2);
    const std::vector<float> q = harness.RandomRows(1, 6);
    TestSequence sequence;
    int64_t at = 0;
    for (const int piece : pieces) {
      harness.AppendTokens(&sequence, {k.begin() + at, k.begin() + at + piece * 128},
                           {v.begin() + at, v.begin() + at + piece * 128});
      at += piece * 128;
    }
    outputs.push_back(harness.Run({Attend(&sequence, q)})[0]);
  }
  EXPECT_EQ(outputs[0].out, outputs[1].out);
  EXPECT_EQ(outputs[0].out, outputs[2].out);
}

INSTANTIATE_TEST_SUITE_P(AllFormats, LawsTest,
                         ::testing::Values(PageFormat::kF32, PageFormat::kF16, PageFormat::kBf16,
                                           PageFormat::kF8E4m3, PageFormat::kProgressive,
                                           PageFormat::kProgressiveF16),
                         [](const ::testing::TestParamInfo<PageFormat>& info) {
                           return std::string(PageFormatName(info.param));
                         });

// 2100 keys make several splits; halves of them as two sequences, merged by LSE, make others.
TEST(SplitLawTest, OneSplitEqualsMany) {
  HarnessOptions options = Options(PageFormat::kF32);
  options.num_pages = 160;
  BackendHarness harness(options);
  ASSERT_TRUE(harness.ok());
  TestSequence whole = harness.NewSequence(2100);
  TestSequence parts[2];
  const int64_t cut = 700 * 128;
  harness.AppendTokens(&parts[0], {whole.k.begin(), whole.k.begin() + cut},
                       {whole.v.begin(), whole.v.begin() + cut});
  harness.AppendTokens(&parts[1], {whole.k.begin() + cut, whole.k.end()},
                       {whole.v.begin() + cut, whole.v.end()});
  const std::vector<float> q = harness.RandomRows(1, 6);
  const std::vector<StepOutput> outputs =
      harness.Run({Attend(&whole, q), Attend(&parts[0], q), Attend(&parts[1], q)});
  for (int head = 0; head < 6; ++head) {
    const double a = outputs[1].lse[head], b = outputs[2].lse[head];
    const double lse = std::max(a, b) + std::log1p(std::exp(-std::abs(a - b)));
    EXPECT_NEAR(outputs[0].lse[head], lse, 1e-5);
    for (int c = 0; c < 64; ++c) {
      const int i = head * 64 + c;
      const double merged =
          std::exp(a - lse) * outputs[1].out[i] + std::exp(b - lse) * outputs[2].out[i];
      EXPECT_NEAR(outputs[0].out[i], merged, 1e-6);
    }
  }
}

// A shard that holds the keys before the row's position, and one that starts after it.
TEST(ShardTest, RowsPastTheLastKeySeeAllOfThem) {
  BackendHarness harness(Options(PageFormat::kF32));
  ASSERT_TRUE(harness.ok());
  TestSequence sequence = harness.NewSequence(100);
  StepCase step = Attend(&sequence, {});
  step.q_start = 5000;
  harness.ExpectExact(step, harness.Run({step})[0], {1e-5, 1e-5});
  step.window = 64;  // all keys lie before the window
  const StepOutput output = harness.Run({step})[0];
  for (const float lse : output.lse) EXPECT_EQ(lse, -std::numeric_limits<float>::infinity());
  for (const float value : output.out) EXPECT_EQ(value, 0);
}

TEST(TypesTest, EveryInAndOutTypeMatchesFloat64) {
  for (const PageFormat format :
       {PageFormat::kF32, PageFormat::kF16, PageFormat::kBf16, PageFormat::kF8E4m3}) {
    for (const DType in : {DType::kF32, DType::kF16, DType::kBf16}) {
      for (const DType out : {DType::kF32, DType::kF16, DType::kBf16}) {
        HarnessOptions options = Options(format);
        options.in_type = in;
        options.out_type = out;
        BackendHarness harness(options);
        ASSERT_TRUE(harness.ok());
        TestSequence sequence = harness.NewSequence(90);
        StepCase step = Attend(&sequence, {});
        ErrorLimits limits = harness.exact_limits();
        limits.out += out == DType::kBf16 ? 4e-3 : out == DType::kF16 ? 5e-4 : 0;
        harness.ExpectExact(step, harness.Run({step})[0], limits);
      }
    }
  }
}

TEST(Fp8ScalesTest, ScaleKeysAndValuesByHead) {
  HarnessOptions options = Options(PageFormat::kF8E4m3);
  BackendHarness harness(options);
  ASSERT_TRUE(harness.ok());
  TestSequence sequence;
  sequence.key_scales = {0.25f, 2.0f};
  sequence.value_scales = {4.0f, 0.5f};
  harness.AppendTokens(&sequence, harness.RandomRows(150, 2), harness.RandomRows(150, 2));
  StepCase step = Attend(&sequence, {});
  harness.ExpectExact(step, harness.Run({step})[0], harness.exact_limits());
}

}  // namespace
}  // namespace adaattn

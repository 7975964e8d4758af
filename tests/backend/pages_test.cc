// Work on whole pages: sealing, reopening, reading back, copying, zeroing, bases.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "tests/backend/backend_harness.h"

namespace adaattn {
namespace {

HarnessOptions Options(PageFormat format) {
  HarnessOptions options;
  options.shape = {4, 2, 64};
  options.format = format;
  options.num_pages = 48;
  return options;
}

double RelativeError(const std::vector<float>& actual, const std::vector<float>& expected) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += std::pow(double{actual[i]} - expected[i], 2);
    norm += std::pow(double{expected[i]}, 2);
  }
  return std::sqrt(error / norm);
}

TEST(ReadTokensTest, ReturnsWhatDensePagesHold) {
  for (const PageFormat format :
       {PageFormat::kF32, PageFormat::kF16, PageFormat::kBf16, PageFormat::kF8E4m3,
        PageFormat::kProgressive, PageFormat::kProgressiveF16}) {
    BackendHarness harness(Options(format));
    ASSERT_TRUE(harness.ok());
    TestSequence sequence = harness.NewSequence(200);
    std::vector<float> k, v;
    for (const auto& range : {std::pair<int64_t, int64_t>{0, 200}, {63, 65}, {130, 131}, {5, 5}}) {
      harness.Read(sequence, range.first, range.second, &k, &v);
      const std::vector<float> want_k(sequence.k.begin() + range.first * 128,
                                      sequence.k.begin() + range.second * 128);
      const std::vector<float> want_v(sequence.v.begin() + range.first * 128,
                                      sequence.v.begin() + range.second * 128);
      EXPECT_EQ(k, want_k);
      EXPECT_EQ(v, want_v);
    }
  }
}

TEST(SealTest, KeepsTokensToTheStoredDepth) {
  const double limits[] = {0.012, 0.045, 0.17};
  int i = 0;
  for (const int32_t stored_bits : {8, 6, 4}) {
    BackendHarness harness(Options(PageFormat::kProgressive));
    ASSERT_TRUE(harness.ok());
    TestSequence sequence = harness.NewSequence(400);
    sequence.stored_bits = stored_bits;
    harness.Seal(&sequence, 5, 5);
    std::vector<float> k, v;
    harness.Read(sequence, 0, 400, &k, &v);
    EXPECT_LT(RelativeError(k, sequence.k), limits[i]) << stored_bits;
    EXPECT_LT(RelativeError(v, sequence.v), limits[i]) << stored_bits;
    EXPECT_GT(RelativeError(k, sequence.k), limits[i] / 8) << stored_bits;
    ++i;
  }
}

TEST(SealTest, DriftIsOneOnTheFittedTokensAndGrowsOnOthers) {
  BackendHarness harness(Options(PageFormat::kProgressive));
  ASSERT_TRUE(harness.ok());
  // Keys in the leading quarter of the channels, then keys everywhere.
  std::vector<float> k = harness.RandomRows(256, 2);
  for (size_t i = 0; i < k.size(); ++i) {
    if (i < 128 * 128 && i % 64 >= 16) k[i] *= 0.05f;
  }
  TestSequence sequence;
  harness.AppendTokens(&sequence, k, harness.RandomRows(256, 2));
  const PageId basis = harness.FitBasis(sequence, 2);
  std::vector<SealTask> tasks;
  tasks.reserve(4);
  for (int page = 0; page < 4; ++page) {
    tasks.push_back({harness.options().shape, sequence.pages[page], harness.NewPage(), basis, 8});
  }
  std::vector<SealResult> results(4);
  ASSERT_TRUE(harness.backend().SealPages(tasks, absl::MakeSpan(results)).ok());
  EXPECT_NEAR((results[0].drift_ratio + results[1].drift_ratio) / 2, 1, 0.05);
  EXPECT_GT(results[2].drift_ratio, 20);
  EXPECT_GT(results[3].drift_ratio, 20);
}

class PageTypeTest : public ::testing::TestWithParam<PageFormat> {};

TEST_P(PageTypeTest, ReopenedPageHoldsTheSealedPagesTokens) {
  const DType type = DenseDType(GetParam());
  for (const int32_t stored_bits : {8, 6, 4}) {
    BackendHarness harness(Options(GetParam()));
    ASSERT_TRUE(harness.ok());
    TestSequence sequence = harness.NewSequence(256);
    sequence.stored_bits = stored_bits;
    harness.Seal(&sequence, 3, 3);
    std::vector<float> sealed_k, sealed_v, k, v;
    harness.Read(sequence, 128, 192, &sealed_k, &sealed_v);
    ReopenTask task{harness.options().shape, sequence.pages[2], harness.NewPage(),
                    sequence.bases[0].basis, stored_bits,       type};
    ASSERT_TRUE(harness.backend().ReopenPages({&task, 1}).ok());
    sequence.pages[2] = task.target;
    --sequence.num_sealed_pages;
    --sequence.bases[0].num_pages;
    harness.Read(sequence, 128, 192, &k, &v);
    for (size_t i = 0; i < k.size(); ++i) {
      EXPECT_EQ(k[i], RoundTo(type, sealed_k[i])) << i;
      EXPECT_EQ(v[i], RoundTo(type, sealed_v[i])) << i;
    }
    // Truncated into the middle of the reopened page and continued from there.
    sequence.k.resize(150 * 128);
    sequence.v.resize(150 * 128);
    sequence.length = 150;
    sequence.pages.resize(3);
    harness.AppendTokens(&sequence, harness.RandomRows(50, 2), harness.RandomRows(50, 2));
    harness.Read(sequence, 150, 200, &k, &v);
    EXPECT_EQ(k, std::vector<float>(sequence.k.begin() + 150 * 128, sequence.k.end()));
  }
}

// The codes come from the tokens as the open page holds them: the finer type leaves less error.
TEST(PageTypesTest, SealedPagesDifferOnlyByTheRoundingOfTheTokens) {
  std::vector<std::vector<float>> keys;
  for (const PageFormat format : {PageFormat::kProgressive, PageFormat::kProgressiveF16}) {
    HarnessOptions options = Options(format);
    options.in_type = DType::kF32;
    BackendHarness harness(options);
    ASSERT_TRUE(harness.ok());
    TestSequence sequence = harness.NewSequence(256);
    harness.Seal(&sequence, 3, 3);
    std::vector<float> v;
    harness.Read(sequence, 0, 192, &keys.emplace_back(), &v);
    EXPECT_LT(RelativeError(keys.back(), {sequence.k.begin(), sequence.k.begin() + 192 * 128}),
              0.012);
  }
  EXPECT_NE(keys[0], keys[1]);
  EXPECT_LT(RelativeError(keys[0], keys[1]), 0.012);
}

INSTANTIATE_TEST_SUITE_P(Progressive, PageTypeTest,
                         ::testing::Values(PageFormat::kProgressive, PageFormat::kProgressiveF16),
                         [](const ::testing::TestParamInfo<PageFormat>& info) {
                           return std::string(PageFormatName(info.param));
                         });

TEST(CopyPageTest, ForksASequence) {
  for (const PageFormat format : {PageFormat::kBf16, PageFormat::kProgressive}) {
    BackendHarness harness(Options(format));
    ASSERT_TRUE(harness.ok());
    TestSequence parent = harness.NewSequence(350);
    if (format == PageFormat::kProgressive) harness.Seal(&parent, 4, 4);
    const std::vector<float> q = harness.RandomRows(1, 4);
    StepCase step;
    step.sequence = &parent;
    step.q = q;
    const StepOutput before = harness.Run({step})[0];
    // The fork shares all but the open page.
    TestSequence fork = parent;
    fork.pages.back() = harness.NewPage();
    ASSERT_TRUE(harness.backend()
                    .CopyPage(parent.pages.back(), fork.pages.back(),
                              DensePageBytes(harness.options().shape, DType::kBf16))
                    .ok());
    step.sequence = &fork;
    EXPECT_EQ(harness.Run({step})[0].out, before.out);
    harness.AppendTokens(&fork, harness.RandomRows(10, 2), harness.RandomRows(10, 2));
    EXPECT_NE(harness.Run({step})[0].out, before.out);
    step.sequence = &parent;
    EXPECT_EQ(harness.Run({step})[0].out, before.out);
  }
}

TEST(ZeroPageTest, ClearsThePage) {
  BackendHarness harness(Options(PageFormat::kBf16));
  ASSERT_TRUE(harness.ok());
  TestSequence sequence = harness.NewSequence(64);
  const int64_t bytes = DensePageBytes(harness.options().shape, DType::kBf16);
  ASSERT_TRUE(harness.backend().ZeroPage(sequence.pages[0], bytes).ok());
  std::vector<float> k, v;
  harness.Read(sequence, 0, 64, &k, &v);
  EXPECT_EQ(k, std::vector<float>(k.size(), 0.0f));
  EXPECT_EQ(v, std::vector<float>(v.size(), 0.0f));
}

TEST(LoadBasisTest, RefusesWhatIsNotOrthonormal) {
  BackendHarness harness(Options(PageFormat::kProgressive));
  ASSERT_TRUE(harness.ok());
  LoadBasisTask task;
  task.shape = harness.options().shape;
  const std::vector<float> mean(2 * 64, 0.0f);
  std::vector<float> basis(2 * 64 * 64, 0.0f);
  for (int head = 0; head < 2; ++head) {
    for (int c = 0; c < 64; ++c) basis[(head * 64 + c) * 64 + c] = 1;
  }
  task.mean = mean;
  task.basis = basis;
  task.target = harness.NewPage();
  EXPECT_TRUE(harness.backend().LoadBasis(task).ok());
  basis[1] = 0.5f;
  EXPECT_EQ(harness.backend().LoadBasis(task).code(), absl::StatusCode::kInvalidArgument);
}

TEST(PlanTest, RefusesShapesWithoutAKernelAndListsThoseWithOne) {
  const std::unique_ptr<Backend> backend = MakeTestBackend(1 << 20);
  ASSERT_NE(backend, nullptr);
  const std::vector<AttentionShape> shapes = {{8, 2, 72}, {34, 2, 64}, {3, 2, 64}, {8, 0, 64}};
  for (const AttentionShape& shape : shapes) {
    AttendBatch batch;
    batch.shape = shape;
    EXPECT_EQ(backend->PlanAttend(batch).status().code(), absl::StatusCode::kUnimplemented);
  }
  EXPECT_FALSE(backend->info().device.empty());
  EXPECT_GE(backend->info().max_q_len, 8);
  EXPECT_EQ(backend->info().pool_bytes, 1 << 20);
}

TEST(CreateBackendTest, RefusesUnknownNamesAndExplainsAuto) {
  BackendOptions options;
  options.pool_bytes = 1 << 20;
  std::string note;
  EXPECT_EQ(CreateBackend("gpu", options, &note).status().code(),
            absl::StatusCode::kInvalidArgument);
  const auto backend = CreateBackend("auto", options, &note);
  ASSERT_TRUE(backend.ok());
  EXPECT_EQ((*backend)->info().name == "cpu", !note.empty());
}

TEST(CreateBackendTest, SaysWhenThePoolCannotBeHad) {
  BackendOptions options;
  options.pool_bytes = int64_t{1} << 60;
  std::string note;
  EXPECT_EQ(CreateBackend("cpu", options, &note).status().code(),
            absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace adaattn

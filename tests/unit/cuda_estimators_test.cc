// The estimators of the CUDA backend against those of the host. Twice: by threads of the host,
// which run the device's own algorithms (kernels/cuda/estimator_rank.h, estimator_entropy.h), and
// by a device where there is one.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "client/trace.h"
#include "kernels/cuda/estimators.h"
#include "kernels/format/float_types.h"
#include "tests/unit/estimator_runners.h"

namespace adaattn {
namespace {

class EstimatorTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (GetParam() == std::string("threads")) {
      runner_ = std::make_unique<EstimatorsByThreads>();
    } else if (HasDevice()) {
      runner_ = std::make_unique<EstimatorsByDevice>();
    } else {
      GTEST_SKIP() << "no CUDA device";
    }
  }

  // Every estimator on the batch, against the host's on the same rows.
  void Compare(const MatrixBatch& x, size_t bytes, double tolerance) {
    RankOptions svd{RankMethod::kRandomizedSvd}, probes{RankMethod::kHutchinson},
        power{RankMethod::kPower};
    svd.range = std::max(1, x.dim / 4);
    svd.power_steps = 1;
    probes.probes = 6;
    probes.steps = 16;
    power.iterations = 12;
    for (const RankOptions& options : {RankOptions(), svd, probes, power}) {
      SCOPED_TRACE(static_cast<int>(options.method));
      RankParams params;
      params.x = x;
      params.options = options;
      params.seed = 11;
      const Ranks ranks = runner_->Run(params, bytes);
      for (int32_t i = 0; i < x.count; ++i) {
        SCOPED_TRACE(i);
        const std::vector<float> rows = RowsOf(x, i);
        const RowsView view{rows, x.dim};
        const RankEstimate expected = EstimateRank(view, options, params.seed + i);
        const RankEstimate& actual = ranks.estimates[i];
        EXPECT_NEAR(actual.rank, expected.rank, tolerance * expected.rank);
        EXPECT_NEAR(actual.low, expected.low, tolerance * expected.rank);
        EXPECT_NEAR(actual.high, expected.high, tolerance * expected.high);
        if (options.method == RankMethod::kSpectrum) CompareEnergies(view, ranks.energies, i);
      }
    }
  }

  std::unique_ptr<EstimatorsUnderTest> runner_;

 private:
  static void CompareEnergies(const RowsView& view, const std::vector<double>& energies,
                              int32_t matrix) {
    const std::vector<double> expected = ExactSpectrum(view);
    for (int32_t c = 0; c < view.dim; ++c) {
      EXPECT_NEAR(energies[matrix * view.dim + c], expected[c], 1e-6 * expected[0]) << c;
    }
  }
  // As floats, less their mean where that is asked.
  static std::vector<float> RowsOf(const MatrixBatch& x, int32_t matrix) {
    std::vector<float> rows;
    for (int64_t i = 0; i < x.rows * x.dim; ++i) {
      rows.push_back(ReadElement(x.values, x.type, matrix * x.stride + i));
    }
    for (int32_t c = 0; x.centred && c < x.dim; ++c) {
      double mean = 0;
      for (int64_t i = 0; i < x.rows; ++i) {
        mean += static_cast<double>(rows[i * x.dim + c]) / static_cast<double>(x.rows);
      }
      for (int64_t i = 0; i < x.rows; ++i) rows[i * x.dim + c] -= static_cast<float>(mean);
    }
    return rows;
  }
};

MatrixBatch BatchOf(const void* values, DType type, int32_t dim, int64_t rows, int32_t count) {
  MatrixBatch x;
  x.values = static_cast<const std::byte*>(values);
  x.type = type;
  x.dim = dim;
  x.rows = rows;
  x.stride = rows * dim;
  x.count = count;
  return x;
}

const char* const kTraces[] = {"data/smollm2-135m-layer15-8k.safetensors",
                               "data/qwen25-coder-1.5b-layer14-8k.safetensors"};

TEST_P(EstimatorTest, RanksOfKeysAreTheHosts) {
  for (const char* path : kTraces) {
    SCOPED_TRACE(path);
    const Trace trace = LoadTrace(path).value();
    MatrixBatch x =
        BatchOf(trace.k.data(), DType::kF16, trace.shape.head_dim, 1000, trace.shape.num_kv_heads);
    x.stride = trace.num_tokens * x.dim;
    x.centred = true;
    Compare(x, trace.k.size() * sizeof(uint16_t), 1e-4);
  }
}

TEST_P(EstimatorTest, RanksOfPagesAreTheHosts) {
  for (const char* path : kTraces) {
    SCOPED_TRACE(path);
    const Trace trace = LoadTrace(path).value();
    for (const std::vector<uint16_t>* tensor : {&trace.k, &trace.v}) {
      MatrixBatch x = BatchOf(tensor->data(), DType::kF16, trace.shape.head_dim, kPageTokens, 3);
      x.stride *= 7;
      x.centred = true;
      Compare(x, tensor->size() * sizeof(uint16_t), 1e-4);
    }
  }
}

TEST_P(EstimatorTest, TakesEveryShapeAndTypeAsItIs) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (const int32_t dim : {1, 2, 64, 80, 96, 256}) {
    for (const DType type : {DType::kF32, DType::kF16, DType::kBf16}) {
      SCOPED_TRACE(testing::Message() << "dim " << dim << ", " << DTypeName(type));
      constexpr int64_t kRows = 130;  // no multiple of what a CTA takes
      std::vector<float> storage(2 * kRows * dim);
      for (int64_t i = 0; i < 2 * kRows * dim; ++i) {
        const float scale = std::exp(-static_cast<float>(i % dim) / 20);
        WriteElement(storage.data(), type, i, (normal(random) + 0.3f) * scale);
      }
      Compare(BatchOf(storage.data(), type, dim, kRows, 2), storage.size() * sizeof(float), 1e-4);
    }
  }
}

// Of two heads, as a pool holds them: page after page, in no order.
TEST_P(EstimatorTest, FindsRowsInTheirPages) {
  constexpr int32_t kDim = 64;
  constexpr int64_t kRows = 150, kPages = PagesOf(kRows), kPageSize = kPageTokens * kDim;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> whole(2 * kRows * kDim);
  for (float& x : whole) x = normal(random);
  std::vector<int64_t> pages;
  for (int64_t i = 0; i < 2 * kPages; ++i) pages.push_back(i * kPageSize);
  std::shuffle(pages.begin(), pages.end(), random);
  std::vector<float> pool(2 * kPages * kPageSize, std::nanf(""));
  for (int64_t i = 0; i < 2 * kRows * kDim; ++i) {
    const int64_t row = i / kDim % kRows, matrix = i / kDim / kRows;
    pool[pages[matrix * kPages + row / kPageTokens] + row % kPageTokens * kDim + i % kDim] =
        whole[i];
  }
  RankParams params;
  params.x = BatchOf(whole.data(), DType::kF32, kDim, kRows, 2);
  params.options = RankOptions{RankMethod::kRandomizedSvd, 16, 1};
  const Ranks expected = runner_->Run(params, whole.size() * sizeof(float));
  params.x.values = reinterpret_cast<const std::byte*>(pool.data());
  params.x.pages = pages.data();
  const Ranks actual = runner_->Run(params, pool.size() * sizeof(float));
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_GT(expected.estimates[i].rank, 1);
    EXPECT_EQ(actual.estimates[i].rank, expected.estimates[i].rank);
  }
}

TEST_P(EstimatorTest, DegenerateRowsHaveTheirRank) {
  constexpr int32_t kDim = 32;
  constexpr int64_t kRows = 100;
  std::vector<float> same, few(4 * kDim, 0.0f), giant;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < kRows * kDim; ++i) {
    same.push_back(0.1f * static_cast<float>(i % kDim) - 1);
    giant.push_back(normal(random) * (i % kDim == 5 ? 1e5f : 1.0f));
  }
  for (int32_t i = 0; i < 4; ++i) few[i * kDim + i] = 1;
  const std::vector<float> zero(kRows * kDim, 0.0f);
  const auto expect = [this](const std::vector<float>& rows, bool centred, double rank) {
    MatrixBatch x =
        BatchOf(rows.data(), DType::kF32, kDim, static_cast<int64_t>(rows.size()) / kDim, 1);
    x.centred = centred;
    for (const RankMethod method : {RankMethod::kSpectrum, RankMethod::kRandomizedSvd,
                                    RankMethod::kHutchinson, RankMethod::kPower}) {
      RankParams params;
      params.x = x;
      params.options = RankOptions{method, 8, 2, 64, 16, 50};
      const double estimate = runner_->Run(params, rows.size() * sizeof(float)).estimates[0].rank;
      const double tolerance = method == RankMethod::kHutchinson ? 0.15 : 0.02;
      EXPECT_NEAR(estimate, rank, tolerance * rank + 1e-9) << static_cast<int>(method);
    }
  };
  expect(same, false, 1);
  expect(zero, false, 0);
  expect(zero, true, 0);
  expect({}, true, 0);
  expect(giant, false, 1);
  expect(few, false, 4);
}

// Scores of rows of real attention, of one row that sees nothing and one of equal scores.
struct ScoreRows {
  std::vector<float> scores;
  std::vector<int32_t> tokens;
  int64_t stride = 0;
};
ScoreRows ScoresOf(const Trace& trace) {
  ScoreRows rows;
  rows.stride = trace.num_tokens;
  const int64_t d = trace.shape.head_dim;
  for (int32_t row = 0; row < trace.num_rows; row += 7) {
    rows.tokens.push_back(trace.positions[row] + 1);
    for (int64_t t = 0; t < rows.stride; ++t) {
      double dot = 0;
      for (int64_t c = 0; c < d; ++c) {
        dot += static_cast<double>(ToFloat(Fp16{trace.q[row * d + c]})) *
               static_cast<double>(ToFloat(Fp16{trace.k[t * d + c]}));
      }
      rows.scores.push_back(static_cast<float>(dot * trace.softmax_scale));
    }
  }
  rows.tokens.insert(rows.tokens.end(), {150, 640, 1});
  rows.scores.insert(rows.scores.end(), rows.stride, -std::numeric_limits<float>::infinity());
  rows.scores.insert(rows.scores.end(), 2 * rows.stride, 1.5f);
  return rows;
}

TEST_P(EstimatorTest, EntropiesAreTheHosts) {
  for (const char* path : kTraces) {
    SCOPED_TRACE(path);
    const ScoreRows rows = ScoresOf(LoadTrace(path).value());
    EntropyParams params;
    params.num_rows = static_cast<int32_t>(rows.tokens.size());
    params.tokens = rows.tokens.data();
    params.scores = rows.scores.data();
    params.score_stride = rows.stride;
    params.page_stride = (rows.stride + kPageTokens - 1) / kPageTokens;
    params.seed = 5;
    params.num_draws = 16;
    for (const EntropyMethod method :
         {EntropyMethod::kExact, EntropyMethod::kProxy, EntropyMethod::kSampled}) {
      params.method = method;
      const Entropies result = runner_->Run(params);
      for (int32_t row = 0; row < params.num_rows; ++row) {
        SCOPED_TRACE(testing::Message()
                     << "method " << static_cast<int>(method) << ", row " << row);
        const absl::Span<const float> scores(rows.scores.data() + row * rows.stride,
                                             static_cast<size_t>(rows.tokens[row]));
        const absl::Span<const double> page_lse(result.page_lse.data() + row * params.page_stride,
                                                (scores.size() + kPageTokens - 1) / kPageTokens);
        const EntropyEstimate expected =
            EstimateEntropy(scores, page_lse, method, params.num_draws, params.seed + row);
        const EntropyEstimate& actual = result.estimates[row];
        EXPECT_NEAR(actual.entropy, expected.entropy, 1e-8);
        EXPECT_NEAR(actual.low, expected.low, 1e-8);
        EXPECT_NEAR(actual.high, expected.high, 1e-8);
        EXPECT_EQ(actual.pages_read, expected.pages_read);
      }
    }
  }
}

TEST(EstimatorParamsTest, SaysWhatIsOutOfRange) {
  RankParams params;
  const auto says = [&params] { return std::string(CheckRankParams(params).message()); };
  params.x.dim = 512;
  EXPECT_EQ(says(), "dim 512; must be from 1 to 256");
  params.x.dim = 64;
  EXPECT_EQ(says(), "");
  params.options.method = RankMethod::kHutchinson;
  EXPECT_EQ(says(), "probes 0; must be from 2 to 4096");
  params.options = RankOptions{RankMethod::kRandomizedSvd, 65, 1};
  EXPECT_EQ(says(), "range 65; must be from 1 to 64");
  params.options.range = 16;
  params.x.type = DType::kF8E4m3;
  EXPECT_EQ(says(), "element type fp8_e4m3; must be fp32, fp16 or bf16");
}

INSTANTIATE_TEST_SUITE_P(By, EstimatorTest, testing::Values("threads", "device"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace adaattn

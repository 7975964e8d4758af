#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/format/basis.h"
#include "kernels/format/hadamard.h"
#include "unit/format_testing.h"

namespace adaattn {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Largest deviation of rotation^T rotation from the identity.
double OrthonormalError(const Basis& basis) {
  const int32_t d = basis.head_dim;
  double worst = 0.0;
  for (int32_t a = 0; a < d; ++a) {
    for (int32_t b = 0; b < d; ++b) {
      double dot = a == b ? -1.0 : 0.0;
      for (int32_t c = 0; c < d; ++c) {
        dot += double{basis.rotation[int64_t{c} * d + a]} * basis.rotation[int64_t{c} * d + b];
      }
      worst = std::max(worst, std::abs(dot));
    }
  }
  return worst;
}

class FittedBasisTest : public ::testing::TestWithParam<int32_t> {};

TEST_P(FittedBasisTest, DecorrelatesTheKeysAndOrdersThemByEnergy) {
  const int32_t d = GetParam(), n = 4 * d;
  const std::vector<float> keys = ModelLikeKeys(11, n, d);
  const AttentionShape shape{1, 1, d};
  const std::vector<std::byte> block = FittedBlock(shape, keys);
  const BasisView view = ViewBasis(block.data(), shape, 0);
  std::vector<double> moment(static_cast<size_t>(d) * d, 0.0);
  std::vector<float> rotated(static_cast<size_t>(d));
  for (int32_t t = 0; t < n; ++t) {
    RotateKey(view, d, keys.data() + int64_t{t} * d, rotated.data());
    for (int32_t a = 0; a < d; ++a) {
      for (int32_t b = 0; b < d; ++b) {
        moment[int64_t{a} * d + b] +=
            double{rotated[static_cast<size_t>(a)]} * rotated[static_cast<size_t>(b)] / n;
      }
    }
  }
  for (int32_t a = 0; a < d; ++a) {
    const double own = moment[int64_t{a} * d + a];
    EXPECT_NEAR(view.energy[a], own, 0.01 * own) << a;
    if (a > 0) {
      EXPECT_GE(view.energy[a - 1], view.energy[a]);
    }
    for (int32_t b = 0; b < a; ++b) {
      const double other = moment[int64_t{b} * d + b];
      EXPECT_LT(std::abs(moment[int64_t{a} * d + b]), 0.05 * std::sqrt(own * other));
    }
  }
}

TEST_P(FittedBasisTest, KeepsScoresThroughTheRotationDespiteItsRounding) {
  const int32_t d = GetParam();
  const AttentionShape shape{2, 2, d};
  const std::vector<float> keys = ModelLikeKeys(12, 512, d);
  const std::vector<std::byte> block = FittedBlock(shape, keys);
  const BasisView view = ViewBasis(block.data(), shape, 1);
  const std::vector<float> q = RandomNormal(13, static_cast<size_t>(d));
  std::vector<float> rotated_q(static_cast<size_t>(d)), rotated_k(rotated_q), restored(rotated_q);
  RotateQuery(view, d, q.data(), rotated_q.data());
  for (int32_t t = 0; t < 50; ++t) {
    const float* const k = keys.data() + int64_t{t} * d;
    RotateKey(view, d, k, rotated_k.data());
    RestoreKey(view, d, rotated_k.data(), restored.data());
    double exact = 0.0, rotated = QueryMeanScore(view, d, q.data());
    for (int32_t c = 0; c < d; ++c) {
      const auto i = static_cast<size_t>(c);
      exact += double{q[i]} * k[c];
      rotated += double{rotated_q[i]} * rotated_k[i];
      EXPECT_NEAR(restored[i], k[c], 1e-4);
    }
    EXPECT_NEAR(rotated, exact, 1e-3);
  }
}

INSTANTIATE_TEST_SUITE_P(HeadDims, FittedBasisTest, ::testing::ValuesIn(kHeadDims));

TEST(FitBasisTest, IsOrthonormalHasFixedSignsAndRepeatsItself) {
  const std::vector<float> keys = ModelLikeKeys(14, 300, 64);
  const Basis basis = FitBasis(64, keys, {}).value();
  EXPECT_LT(OrthonormalError(basis), 1e-6);
  for (int32_t r = 0; r < 64; ++r) {
    float largest = 0.0f;
    for (int32_t c = 0; c < 64; ++c) {
      const float entry = basis.rotation[int64_t{c} * 64 + r];
      if (std::abs(entry) > std::abs(largest)) largest = entry;
    }
    EXPECT_GT(largest, 0.0f) << r;
  }
  const Basis again = FitBasis(64, keys, {}).value();
  EXPECT_EQ(again.rotation, basis.rotation);
  EXPECT_EQ(again.mean, basis.mean);
}

TEST(FitBasisTest, QueriesDecideWhichChannelsComeFirst) {
  // Keys spread along channel 0 most, then 1, ...; queries look along channel 5 alone.
  constexpr int32_t kDim = 64;
  std::vector<float> keys = RandomNormal(15, 4096 * kDim);
  for (size_t i = 0; i < keys.size(); ++i) {
    keys[i] *= std::exp2(-0.25f * static_cast<float>(i % kDim));
  }
  std::vector<float> queries(kDim, 0.0f);
  queries[5] = 2.0f;
  const Basis by_energy = FitBasis(kDim, keys, {}).value();
  const Basis by_query = FitBasis(kDim, keys, queries).value();
  EXPECT_GT(by_energy.rotation[0 * kDim + 0], 0.99f);
  EXPECT_GT(by_query.rotation[5 * kDim + 0], 0.99f);
}

TEST(FitBasisTest, ZeroQueriesKeepTheOrderOfEnergies) {
  const std::vector<float> keys = ModelLikeKeys(16, 300, 64);
  const std::vector<float> zeros(64, 0.0f);
  EXPECT_EQ(FitBasis(64, keys, zeros)->rotation, FitBasis(64, keys, {})->rotation);
}

TEST(FitBasisTest, ConstantAndFewKeysGiveCompleteBases) {
  const std::vector<float> constant(100 * 80, 3.25f);
  const Basis flat = FitBasis(80, constant, {}).value();
  EXPECT_LT(OrthonormalError(flat), 1e-6);
  EXPECT_THAT(flat.mean, Each(3.25f));
  EXPECT_THAT(flat.energy, Each(0.0f));
  const std::vector<float> three = RandomNormal(17, 3 * 80);
  const Basis thin = FitBasis(80, three, {}).value();
  EXPECT_LT(OrthonormalError(thin), 1e-6);
  EXPECT_GT(thin.energy[1], 0.1f);
  EXPECT_LT(thin.energy[2], 1e-6f);  // three points span two directions around their mean
}

TEST(FitBasisTest, RefusesWhatIsNotKeys) {
  const std::vector<float> keys(65, 1.0f);
  EXPECT_THAT(std::string(FitBasis(64, {}, {}).status().message()), HasSubstr("keys is empty"));
  EXPECT_THAT(std::string(FitBasis(64, keys, {}).status().message()), HasSubstr("65 elements"));
  std::vector<float> bad(128, 1.0f);
  bad[70] = kNan;
  EXPECT_EQ(FitBasis(64, bad, {}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(FitBasis(64, bad, {}).status().message()), HasSubstr("keys[70]"));
  const std::vector<float> good(128, 1.0f);
  bad[70] = std::numeric_limits<float>::infinity();
  EXPECT_THAT(std::string(FitBasis(64, good, bad).status().message()), HasSubstr("queries[70]"));
}

TEST(CheckBasisTest, TakesAnOrthonormalBasisWithUnknownEnergies) {
  std::vector<float> hadamard(64 * 64, 0.0f);
  for (int32_t r = 0; r < 64; ++r) {
    hadamard[int64_t{r} * 64 + r] = 1.0f;
    RotateHadamard(hadamard.data() + r * 64, 64);
  }
  const std::vector<float> mean(64, 0.5f);
  const absl::StatusOr<Basis> basis = CheckBasis(64, mean, hadamard);
  ASSERT_TRUE(basis.ok()) << basis.status();
  EXPECT_THAT(basis->energy, Each(0.0f));
  EXPECT_EQ(basis->rotation, hadamard);
}

TEST(CheckBasisTest, RefusesWrongSizesNanAndSkewedColumns) {
  const std::vector<float> mean(64, 0.0f);
  std::vector<float> identity(64 * 64, 0.0f);
  for (size_t r = 0; r < 64; ++r) identity[r * 65] = 1.0f;
  const auto message = [&](absl::Span<const float> m, absl::Span<const float> b) {
    const absl::Status status = CheckBasis(64, m, b).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_THAT(message({}, identity), HasSubstr("mean has 0 elements; must have 64"));
  EXPECT_THAT(message(mean, mean), HasSubstr("basis has 64 elements; must have 4096"));
  std::vector<float> broken = identity;
  broken[100] = kNan;
  EXPECT_THAT(message(mean, broken), HasSubstr("basis[100] is nan"));
  broken = identity;
  broken[1] = 0.01f;  // row 0 of column 1
  EXPECT_THAT(message(mean, broken), HasSubstr("columns 0 and 1"));
  broken[1] = 0.0005f;
  EXPECT_TRUE(CheckBasis(64, mean, broken).ok());
}

TEST(DriftRatioTest, IsOneOnTheFittedKeysAndGrowsWithTheirSquare) {
  constexpr int32_t kDim = 96;
  const AttentionShape shape{1, 1, kDim};
  const std::vector<float> keys = ModelLikeKeys(18, 256, kDim);
  const std::vector<std::byte> block = FittedBlock(shape, keys);
  const BasisView view = ViewBasis(block.data(), shape, 0);
  std::vector<float> rotated(keys.size());
  for (size_t t = 0; t < 256; ++t) {
    RotateKey(view, kDim, keys.data() + t * kDim, rotated.data() + t * kDim);
  }
  EXPECT_NEAR(DriftRatio(view, kDim, rotated), 1.0f, 0.01f);
  for (float& value : rotated) value *= 2.0f;
  EXPECT_NEAR(DriftRatio(view, kDim, rotated), 4.0f, 0.04f);
}

TEST(DriftRatioTest, IsOneWhereNothingIsKnown) {
  const std::vector<float> energy(64, 0.0f), rotated(64, 5.0f), known(64, 1.0f);
  BasisView view;
  view.energy = energy.data();
  EXPECT_EQ(DriftRatio(view, 64, rotated), 1.0f);
  view.energy = known.data();
  EXPECT_EQ(DriftRatio(view, 64, {}), 1.0f);
}

class HadamardTest : public ::testing::TestWithParam<int32_t> {};

TEST_P(HadamardTest, IsItsOwnInverseAndKeepsLengths) {
  const int32_t d = GetParam();
  const std::vector<float> original = RandomNormal(19, static_cast<size_t>(d));
  std::vector<float> vector = original;
  RotateHadamard(vector.data(), d);
  double before = 0, after = 0;
  for (size_t i = 0; i < original.size(); ++i) {
    before += double{original[i]} * original[i];
    after += double{vector[i]} * vector[i];
  }
  EXPECT_NEAR(after / before, 1.0, 1e-6);
  RotateHadamard(vector.data(), d);
  for (size_t i = 0; i < original.size(); ++i) EXPECT_NEAR(vector[i], original[i], 1e-5);
}

TEST_P(HadamardTest, SpreadsOneChannelOverItsBlock) {
  const int32_t d = GetParam();
  const int32_t block = HadamardBlock(d), last = d - block;
  for (const int32_t channel : {0, d - 1}) {
    std::vector<float> vector(static_cast<size_t>(d), 0.0f);
    vector[static_cast<size_t>(channel)] = 1.0f;
    RotateHadamard(vector.data(), d);
    const bool tail = channel >= block;
    const int32_t size = tail ? last : block;
    for (int32_t c = 0; c < d; ++c) {
      const bool inside = tail ? c >= block : c < block;
      EXPECT_NEAR(std::abs(vector[static_cast<size_t>(c)]),
                  inside ? 1.0 / std::sqrt(double{1.0} * size) : 0.0, 1e-6);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(HeadDims, HadamardTest, ::testing::ValuesIn(kHeadDims));

}  // namespace
}  // namespace adaattn

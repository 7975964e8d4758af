#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <tuple>

#include "kernels/format/hadamard.h"
#include "kernels/format/nested_code.h"
#include "kernels/format/seal.h"
#include "unit/format_testing.h"

namespace adaattn {
namespace {

constexpr std::byte kPoison{0xff};  // as floats: NaN

// One sealed head of two, and what went into it.
struct Sealed {
  AttentionShape shape;
  SealedHead head;
  std::vector<std::byte> block;
  std::vector<float> keys, values;
  std::vector<std::byte> page;
  float drift = 0;

  BasisView basis() const { return ViewBasis(block.data(), shape, head.kv_head); }
};

Sealed Seal(int32_t head_dim, int32_t stored_bits, TileOrder order, std::vector<float> keys,
            std::vector<float> values) {
  Sealed sealed;
  sealed.shape = AttentionShape{4, 2, head_dim};
  sealed.head = MakeSealedHead(sealed.shape, 1, stored_bits, order);
  sealed.block = FittedBlock(sealed.shape, ModelLikeKeys(21, 512, head_dim));
  sealed.keys = std::move(keys);
  sealed.values = std::move(values);
  sealed.page.assign(static_cast<size_t>(sealed.head.layout.page_bytes), kPoison);
  sealed.drift = SealHead(sealed.head, sealed.basis(), sealed.keys.data(), sealed.values.data(),
                          sealed.page.data());
  return sealed;
}

Sealed SealModelLike(int32_t head_dim, int32_t stored_bits, TileOrder order) {
  return Seal(head_dim, stored_bits, order, ModelLikeKeys(22, kPageTokens, head_dim),
              RandomNormal(23, static_cast<size_t>(kPageTokens) * head_dim));
}

std::vector<float> RotatedKeys(const Sealed& sealed) {
  const int32_t d = sealed.shape.head_dim;
  std::vector<float> rotated(sealed.keys.size());
  for (int64_t t = 0; t < kPageTokens; ++t) {
    RotateKey(sealed.basis(), d, sealed.keys.data() + t * d, rotated.data() + t * d);
  }
  return rotated;
}

std::vector<float> RotatedValues(const Sealed& sealed) {
  const int32_t d = sealed.shape.head_dim;
  std::vector<float> rotated = sealed.values;
  for (int64_t t = 0; t < kPageTokens; ++t) RotateHadamard(rotated.data() + t * d, d);
  return rotated;
}

std::vector<float> NanFilled(size_t count) {
  return std::vector<float>(count, std::numeric_limits<float>::quiet_NaN());
}

using SealCase = std::tuple<int32_t, int32_t, TileOrder>;

class SealTest : public ::testing::TestWithParam<SealCase> {
 protected:
  SealTest()
      : sealed_(SealModelLike(std::get<0>(GetParam()), std::get<1>(GetParam()),
                              std::get<2>(GetParam()))) {}
  int32_t head_dim() const { return std::get<0>(GetParam()); }
  int32_t stored_bits() const { return std::get<1>(GetParam()); }
  Sealed sealed_;
};

TEST_P(SealTest, KeysDecodeWithinTheStepOfTheirDepth) {
  const int32_t d = head_dim();
  const std::vector<float> exact = RotatedKeys(sealed_);
  const uint8_t* const scales = KeyScales(sealed_.head, sealed_.page.data());
  for (int32_t bits = 4; bits <= stored_bits(); bits += 2) {
    for (int32_t chunks = 1; chunks <= NumRankChunks(d); ++chunks) {
      std::vector<float> decoded = NanFilled(exact.size());
      DecodeRotatedKeys(sealed_.head, sealed_.page.data(), bits, chunks, decoded.data());
      for (size_t i = 0; i < exact.size(); ++i) {
        const auto channel = static_cast<int32_t>(i % static_cast<size_t>(d));
        if (channel >= ChunkedRank(d, chunks)) {
          ASSERT_EQ(decoded[i], 0.0f);
          continue;
        }
        const float range = RangeFromScale(scales[channel]);
        ASSERT_LE(std::abs(decoded[i] - exact[i]), range / static_cast<float>(1 << bits) * 1.0001f)
            << "token " << i / static_cast<size_t>(d) << " channel " << channel << " bits " << bits;
      }
    }
  }
}

TEST_P(SealTest, ValuesDecodeWithinTheStepOfTheirDepth) {
  const int32_t d = head_dim(), groups = ValueGroups(d);
  const std::vector<float> exact = RotatedValues(sealed_);
  const uint8_t* const scales = ValueScales(sealed_.head, sealed_.page.data());
  for (int32_t bits = 2; bits <= stored_bits(); bits += 2) {
    std::vector<float> decoded = NanFilled(exact.size());
    DecodeRotatedValues(sealed_.head, sealed_.page.data(), bits, decoded.data());
    for (int32_t t = 0; t < kPageTokens; ++t) {
      for (int32_t c = 0; c < d; ++c) {
        const int64_t i = int64_t{t} * d + c;
        const float range = RangeFromScale(scales[t * groups + c / (d / groups)]);
        ASSERT_LE(std::abs(decoded[i] - exact[i]), range / static_cast<float>(1 << bits) * 1.0001f)
            << "token " << t << " channel " << c << " bits " << bits;
      }
    }
  }
}

TEST_P(SealTest, FullDepthRestoresTheModelsKeysAndValues) {
  std::vector<float> keys = NanFilled(sealed_.keys.size()), values = keys;
  DecodeKeys(sealed_.head, sealed_.basis(), sealed_.page.data(), stored_bits(),
             NumRankChunks(head_dim()), keys.data());
  DecodeValues(sealed_.head, sealed_.page.data(), stored_bits(), values.data());
  const double tolerance = stored_bits() == 8 ? 0.012 : stored_bits() == 6 ? 0.045 : 0.18;
  const auto error = [](const std::vector<float>& actual, const std::vector<float>& expected) {
    return RelativeError(std::vector<double>(actual.begin(), actual.end()),
                         std::vector<double>(expected.begin(), expected.end()));
  };
  EXPECT_LT(error(keys, sealed_.keys), tolerance);
  EXPECT_LT(error(values, sealed_.values), tolerance);
  EXPECT_GT(error(values, sealed_.values), tolerance / 20);  // the codes are what is decoded
}

TEST_P(SealTest, WritesEveryByteOfItsSectionsAndNoOther) {
  const PageLayout& layout = sealed_.head.layout;
  std::vector<bool> own(sealed_.page.size(), false);
  const auto mark = [&](const PageLayout::Section& section) {
    for (int64_t i = 0; i < section.bytes; ++i) {
      own[static_cast<size_t>(section.offset + sealed_.head.kv_head * section.bytes + i)] = true;
    }
  };
  mark(layout.key_scales);
  mark(layout.value_summary);
  for (int32_t c = 0; c < layout.num_chunks; ++c) mark(layout.key_base[c]);
  for (int32_t p = 0; p < (stored_bits() - 4) / 2; ++p) mark(layout.key_fine[p]);
  mark(layout.value_scales);
  for (int32_t p = 0; p < stored_bits() / 2; ++p) mark(layout.value_plane[p]);
  std::vector<std::byte> cleared(sealed_.page.size(), std::byte{0});
  SealHead(sealed_.head, sealed_.basis(), sealed_.keys.data(), sealed_.values.data(),
           cleared.data());
  for (size_t i = 0; i < own.size(); ++i) {
    if (own[i]) {
      ASSERT_EQ(sealed_.page[i], cleared[i]) << "byte " << i << " keeps what was there before";
    } else {
      ASSERT_EQ(sealed_.page[i], kPoison) << "byte " << i << " belongs to another head";
      ASSERT_EQ(cleared[i], std::byte{0}) << "byte " << i << " belongs to another head";
    }
  }
}

TEST_P(SealTest, SummaryTellsMeanSpreadAndRadius) {
  const int32_t d = head_dim();
  const std::vector<float> exact = RotatedValues(sealed_);
  const ValueSummary summary = ReadValueSummary(sealed_.head, sealed_.page.data());
  std::vector<float> mean = NanFilled(exact.size());
  DecodeRotatedValues(sealed_.head, sealed_.page.data(), 0, mean.data());
  for (int32_t c = 0; c < d; ++c) {
    double expected = 0.0;
    for (int32_t t = 0; t < kPageTokens; ++t) expected += exact[int64_t{t} * d + c];
    EXPECT_NEAR(mean[static_cast<size_t>(c)], expected / kPageTokens, summary.mean_scale * 0.501);
    EXPECT_EQ(mean[static_cast<size_t>(c)], mean[int64_t{63} * d + c]);
  }
  double total = 0.0, largest = 0.0;
  for (int32_t t = 0; t < kPageTokens; ++t) {
    double distance2 = 0.0;
    for (int32_t c = 0; c < d; ++c) {
      const int64_t i = int64_t{t} * d + c;
      distance2 += (double{exact[i]} - mean[i]) * (double{exact[i]} - mean[i]);
    }
    total += distance2;
    largest = std::max(largest, distance2);
  }
  EXPECT_NEAR(summary.spread, std::sqrt(total / kPageTokens), 1e-3);
  EXPECT_NEAR(summary.radius, std::sqrt(largest), 1e-3);
  double range2 = 0.0;
  for (int32_t i = 0; i < kPageTokens * ValueGroups(d); ++i) {
    const double range = RangeFromScale(ValueScales(sealed_.head, sealed_.page.data())[i]);
    range2 += range * range / (kPageTokens * ValueGroups(d));
  }
  EXPECT_NEAR(summary.scale_rms, std::sqrt(range2), 1e-4);
}

TEST_P(SealTest, FirstValueAloneIsTheFirstOfAll) {
  std::vector<float> all = NanFilled(sealed_.values.size());
  std::vector<float> first = NanFilled(static_cast<size_t>(head_dim()));
  for (int32_t bits = 2; bits <= stored_bits(); bits += 2) {
    DecodeRotatedValues(sealed_.head, sealed_.page.data(), bits, all.data());
    const float rms =
        DecodeFirstRotatedValue(sealed_.head, sealed_.page.data(), bits, first.data());
    EXPECT_EQ(0, std::memcmp(all.data(), first.data(), first.size() * sizeof(float)));
    const double range = RangeFromScale(ValueScales(sealed_.head, sealed_.page.data())[0]);
    EXPECT_NEAR(rms / range, 1.0, 0.5);  // the groups' ranges differ little here
  }
}

INSTANTIATE_TEST_SUITE_P(Depths, SealTest,
                         ::testing::Combine(::testing::ValuesIn(kHeadDims),
                                            ::testing::Values(4, 6, 8),
                                            ::testing::Values(TileOrder::kLanes, TileOrder::kMma)),
                         [](const ::testing::TestParamInfo<SealCase>& info) {
                           return "d" + std::to_string(std::get<0>(info.param)) + "_b" +
                                  std::to_string(std::get<1>(info.param)) +
                                  (std::get<2>(info.param) == TileOrder::kLanes ? "_lanes"
                                                                                : "_mma");
                         });

TEST(SealOrderTest, TileOrdersHoldTheSameCodes) {
  const Sealed lanes = SealModelLike(80, 8, TileOrder::kLanes);
  const Sealed mma = SealModelLike(80, 8, TileOrder::kMma);
  std::vector<float> a(lanes.keys.size()), b(a.size());
  DecodeRotatedKeys(lanes.head, lanes.page.data(), 6, 2, a.data());
  DecodeRotatedKeys(mma.head, mma.page.data(), 6, 2, b.data());
  EXPECT_EQ(a, b);
  DecodeRotatedValues(lanes.head, lanes.page.data(), 4, a.data());
  DecodeRotatedValues(mma.head, mma.page.data(), 4, b.data());
  EXPECT_EQ(a, b);
}

TEST(SealEdgeTest, LowerStoredDepthIsAPrefixOfTheFullCode) {
  const Sealed full = SealModelLike(128, 8, TileOrder::kLanes);
  const Sealed four = SealModelLike(128, 4, TileOrder::kLanes);
  std::vector<float> a(full.keys.size()), b(a.size());
  DecodeRotatedKeys(full.head, full.page.data(), 4, 4, a.data());
  DecodeRotatedKeys(four.head, four.page.data(), 4, 4, b.data());
  EXPECT_EQ(a, b);
  DecodeRotatedValues(full.head, full.page.data(), 4, a.data());
  DecodeRotatedValues(four.head, four.page.data(), 4, b.data());
  EXPECT_EQ(a, b);
}

TEST(SealEdgeTest, SummaryTakesInWhatTheBasisSaysOfValues) {
  const AttentionShape shape{1, 1, 64};
  const std::vector<float> keys = ModelLikeKeys(4, kPageTokens, 64);
  const std::vector<float> values = RandomNormal(5, kPageTokens * 64);
  const SealedHead head = MakeSealedHead(shape, 0, 8, TileOrder::kLanes);
  ValueSummary summaries[2];
  std::vector<float> decoded[2];
  for (int i = 0; i < 2; ++i) {
    Basis basis = FitBasis(64, keys, {}).value();
    if (i == 1) basis.value_factors = {1.5f, 2.0f};
    std::vector<std::byte> block(static_cast<size_t>(MakeBasisLayout(shape).block_bytes));
    WriteBasis(basis, shape, 0, block.data());
    std::vector<std::byte> page(static_cast<size_t>(head.layout.page_bytes));
    SealHead(head, ViewBasis(block.data(), shape, 0), keys.data(), values.data(), page.data());
    summaries[i] = ReadValueSummary(head, page.data());
    decoded[i].resize(values.size());
    DecodeValues(head, page.data(), 8, decoded[i].data());
  }
  EXPECT_FLOAT_EQ(summaries[1].spread, 1.5f * summaries[0].spread);
  EXPECT_FLOAT_EQ(summaries[1].scale_rms, 2.0f * summaries[0].scale_rms);
  EXPECT_EQ(summaries[1].radius, summaries[0].radius) << "bounds do not depend on it";
  EXPECT_EQ(summaries[1].mean_scale, summaries[0].mean_scale);
  EXPECT_EQ(decoded[1], decoded[0]);
}

TEST(SealEdgeTest, ZeroValuesDecodeToAlmostNothing) {
  const std::vector<float> zeros(kPageTokens * 64, 0.0f);
  const Sealed sealed = Seal(64, 8, TileOrder::kLanes, zeros, zeros);
  std::vector<float> values = NanFilled(zeros.size());
  for (const int32_t bits : {0, 2, 8}) {
    DecodeValues(sealed.head, sealed.page.data(), bits, values.data());
    for (const float value : values) ASSERT_LT(std::abs(value), 1e-11f) << bits;
  }
  EXPECT_EQ(ReadValueSummary(sealed.head, sealed.page.data()).mean_scale, 0.0f);
  EXPECT_EQ(ReadValueSummary(sealed.head, sealed.page.data()).spread, 0.0f);
}

TEST(SealEdgeTest, OneGiantChannelDoesNotCoarsenTheOthers) {
  std::vector<float> keys = RandomNormal(24, kPageTokens * 64);
  for (size_t t = 0; t < kPageTokens; ++t) keys[t * 64 + 7] = t % 2 == 0 ? 500.0f : -500.0f;
  const AttentionShape shape{1, 1, 64};
  const std::vector<std::byte> block = FittedBlock(shape, keys);
  const BasisView basis = ViewBasis(block.data(), shape, 0);
  const SealedHead head = MakeSealedHead(shape, 0, 8, TileOrder::kLanes);
  std::vector<std::byte> page(static_cast<size_t>(head.layout.page_bytes), kPoison);
  EXPECT_NEAR(SealHead(head, basis, keys.data(), keys.data(), page.data()), 1.0f, 0.02f);
  std::vector<float> decoded = NanFilled(keys.size());
  DecodeKeys(head, basis, page.data(), 8, 4, decoded.data());
  double error2 = 0.0;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (i % 64 != 7) error2 += (decoded[i] - keys[i]) * (decoded[i] - keys[i]);
  }
  EXPECT_LT(std::sqrt(error2 / (kPageTokens * 63)), 0.02);
}

}  // namespace
}  // namespace adaattn

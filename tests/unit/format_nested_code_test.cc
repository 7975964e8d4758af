#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "kernels/format/nested_code.h"

namespace adaattn {
namespace {

TEST(NestedCodeTest, RangesAreQuarterOctaves) {
  for (int32_t scale = 0; scale < 256; ++scale) {
    const double expected = std::exp2((scale - kRangeOffset) / 4.0);
    EXPECT_NEAR(RangeFromScale(static_cast<uint8_t>(scale)) / expected, 1.0, 1e-7) << scale;
  }
}

TEST(NestedCodeTest, RangesReachFromTinyToRotatedFp16) {
  EXPECT_LT(RangeFromScale(0), 1e-9f);
  EXPECT_GT(RangeFromScale(255), 65504.0f * 16.0f);  // 256 channels of 65504, Hadamard rotated
}

TEST(NestedCodeTest, ScaleIsTheSmallestRangeThatHolds) {
  for (int32_t scale = 1; scale < 255; ++scale) {
    const float range = RangeFromScale(static_cast<uint8_t>(scale));
    EXPECT_EQ(ScaleFromMax(range), scale);
    EXPECT_EQ(ScaleFromMax(std::nextafter(range, 0.0f)), scale);
    EXPECT_EQ(ScaleFromMax(std::nextafter(range, 1e30f)), scale + 1);
  }
}

TEST(NestedCodeTest, ScaleSaturatesAtBothEnds) {
  EXPECT_EQ(ScaleFromMax(0.0f), 0);
  EXPECT_EQ(ScaleFromMax(std::numeric_limits<float>::denorm_min()), 0);
  EXPECT_EQ(ScaleFromMax(1e-20f), 0);
  EXPECT_EQ(ScaleFromMax(1e30f), 255);
  EXPECT_EQ(ScaleFromMax(std::numeric_limits<float>::infinity()), 255);
  EXPECT_EQ(ScaleFromMax(std::numeric_limits<float>::quiet_NaN()), 255);
}

TEST(NestedCodeTest, EveryPrefixStaysWithinItsStep) {
  std::mt19937 random(2);
  for (const int32_t scale : {0, 7, 130, 160, 163, 255}) {
    const float range = RangeFromScale(static_cast<uint8_t>(scale));
    std::uniform_real_distribution<float> uniform(-range, range);
    for (int i = 0; i < 2000; ++i) {
      const float value = i == 0 ? range : i == 1 ? -range : i == 2 ? 0.0f : uniform(random);
      const uint32_t code = EncodeNested(value, range);
      for (int32_t bits = 1; bits <= 8; ++bits) {
        const float decoded = DecodeNested(code >> (8 - bits), bits, range);
        EXPECT_LE(std::abs(value - decoded), range / static_cast<float>(1 << bits) * 1.0001f)
            << "value " << value << " range " << range << " bits " << bits;
      }
    }
  }
}

TEST(NestedCodeTest, CodesClampOutsideTheRange) {
  EXPECT_EQ(EncodeNested(5.0f, 1.0f), 255);
  EXPECT_EQ(EncodeNested(-5.0f, 1.0f), 0);
  EXPECT_EQ(EncodeNested(1.0f, 1.0f), 255);
  EXPECT_EQ(EncodeNested(-1.0f, 1.0f), 0);
  EXPECT_EQ(EncodeNested(0.0f, 1.0f), 128);
  EXPECT_EQ(EncodeNested(std::numeric_limits<float>::quiet_NaN(), 1.0f), 0);
  EXPECT_EQ(EncodeNested(std::numeric_limits<float>::infinity(), 1.0f), 255);
}

TEST(NestedCodeTest, DecodedPrefixesAreTheFormula) {
  for (uint32_t code = 0; code < 256; ++code) {
    for (const int32_t bits : {2, 4, 6, 8}) {
      const uint32_t prefix = code >> (8 - bits);
      const double expected = ((prefix + 0.5) / std::exp2(bits - 1) - 1.0) * 3.0;
      EXPECT_EQ(DecodeNested(prefix, bits, 3.0f), static_cast<float>(expected));
    }
  }
}

TEST(NestedCodeTest, VarianceIsThatOfEvenlySpreadValues) {
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(-2.0f, 2.0f);
  for (const int32_t bits : {2, 4, 6, 8}) {
    double sum = 0.0;
    constexpr int kDraws = 20000;
    for (int i = 0; i < kDraws; ++i) {
      const float value = uniform(random);
      const uint32_t code = EncodeNested(value, 2.0f);
      const double off = double{value} - DecodeNested(code >> (8 - bits), bits, 2.0f);
      sum += off * off;
    }
    EXPECT_NEAR(sum / kDraws / CodeVariance(2.0f, bits), 1.0, 0.03) << bits;
  }
  EXPECT_FLOAT_EQ(UnreadVariance(2.0f), 4.0f / 6.0f);
}

}  // namespace
}  // namespace adaattn

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <random>

#include "kernels/format/float_types.h"

namespace adaattn {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(FloatTypesTest, EveryFp16SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = ToFloat(Fp16{static_cast<uint16_t>(bits)});
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(ToFloat(ToFp16(value)))) << bits;
    } else {
      EXPECT_EQ(ToFp16(value).bits, bits);
    }
  }
}

TEST(FloatTypesTest, EveryBf16SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = ToFloat(Bf16{static_cast<uint16_t>(bits)});
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(ToFloat(ToBf16(value)))) << bits;
    } else {
      EXPECT_EQ(ToBf16(value).bits, bits);
    }
  }
}

TEST(FloatTypesTest, EveryFp8SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x100; ++bits) {
    const float value = ToFloat(Fp8E4m3{static_cast<uint8_t>(bits)});
    EXPECT_EQ(ToFp8E4m3(value).bits, bits) << value;
    EXPECT_EQ(std::isnan(value), (bits & 0x7f) == 0x7f);
  }
  EXPECT_EQ(ToFloat(Fp8E4m3{0x7e}), kFp8E4m3Max);
  EXPECT_EQ(ToFloat(Fp8E4m3{0x01}), 0x1p-9f);
}

// The nearest of all finite values of a narrow type, ties to the even pattern, by brute force.
template <typename T, typename Bits>
Bits Nearest(float value, Bits largest_finite) {
  Bits best = 0;
  double best_distance = std::numeric_limits<double>::infinity();
  for (uint32_t bits = 0; bits <= largest_finite; ++bits) {
    const double distance =
        std::abs(double{ToFloat(T{static_cast<Bits>(bits)})} - std::abs(double{value}));
    if (distance < best_distance || (distance == best_distance && bits % 2 == 0)) {
      best = static_cast<Bits>(bits);
      best_distance = distance;
    }
  }
  return best;
}

TEST(FloatTypesTest, Fp8RoundsToTheNearestTiesToEven) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> exponent(-12.0f, 8.7f);
  for (int i = 0; i < 4000; ++i) {
    const float value = std::exp2(exponent(random));
    EXPECT_EQ(ToFp8E4m3(value).bits, (Nearest<Fp8E4m3, uint8_t>(value, 0x7e))) << value;
    EXPECT_EQ(ToFp8E4m3(-value).bits, ToFp8E4m3(value).bits | 0x80);
  }
  for (uint32_t bits = 0; bits < 0x7e; ++bits) {  // every midpoint
    const float low = ToFloat(Fp8E4m3{static_cast<uint8_t>(bits)});
    const float high = ToFloat(Fp8E4m3{static_cast<uint8_t>(bits + 1)});
    EXPECT_EQ(ToFp8E4m3((low + high) / 2).bits, bits + bits % 2) << low;
  }
}

TEST(FloatTypesTest, Fp16RoundsToTheNearestTiesToEven) {
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const float low = ToFloat(Fp16{static_cast<uint16_t>(bits)});
    const float high = ToFloat(Fp16{static_cast<uint16_t>(bits + 1)});
    const float middle = low + (high - low) / 2;
    ASSERT_EQ(ToFp16(middle).bits, bits + bits % 2) << low;
    ASSERT_EQ(ToFp16(std::nextafter(middle, 0.0f)).bits, bits) << low;
    ASSERT_EQ(ToFp16(std::nextafter(middle, kInfinity)).bits, bits + 1) << low;
  }
}

TEST(FloatTypesTest, Bf16RoundsToTheNearestTiesToEven) {
  EXPECT_EQ(ToBf16(FloatFromBits(0x3f808000u)).bits, 0x3f80);
  EXPECT_EQ(ToBf16(FloatFromBits(0x3f818000u)).bits, 0x3f82);
  EXPECT_EQ(ToBf16(FloatFromBits(0x3f808001u)).bits, 0x3f81);
  EXPECT_EQ(ToBf16(FloatFromBits(0x3f807fffu)).bits, 0x3f80);
  EXPECT_EQ(ToBf16(std::numeric_limits<float>::max()).bits, 0x7f80);  // infinity
}

TEST(FloatTypesTest, OverflowAndNanKeepTheirMeaning) {
  EXPECT_EQ(ToFp16(65519.0f).bits, 0x7bff);
  EXPECT_EQ(ToFp16(65520.0f).bits, 0x7c00);
  EXPECT_EQ(ToFp16(-kInfinity).bits, 0xfc00);
  EXPECT_EQ(ToFp8E4m3(1e9f).bits, 0x7e);
  EXPECT_EQ(ToFp8E4m3(-kInfinity).bits, 0xfe);
  EXPECT_TRUE(std::isnan(ToFloat(ToFp16(kNan))));
  EXPECT_TRUE(std::isnan(ToFloat(ToBf16(kNan))));
  EXPECT_TRUE(std::isnan(ToFloat(ToFp8E4m3(kNan))));
  EXPECT_TRUE(std::isnan(ToFloat(ToBf16(FloatFromBits(0x7f800001u)))));  // payload below the cut
}

TEST(FloatTypesTest, FiniteMeansNeitherInfiniteNorNan) {
  EXPECT_TRUE(IsFiniteFloat(0.0f));
  EXPECT_TRUE(IsFiniteFloat(-std::numeric_limits<float>::max()));
  EXPECT_FALSE(IsFiniteFloat(kInfinity));
  EXPECT_FALSE(IsFiniteFloat(-kInfinity));
  EXPECT_FALSE(IsFiniteFloat(kNan));
}

TEST(FloatTypesTest, ElementsAreReadBackWhereTheyWereWritten) {
  for (const DType type : {DType::kF32, DType::kF16, DType::kBf16, DType::kF8E4m3}) {
    std::array<char, 17> bytes;
    bytes.fill('\x55');
    char* const unaligned = bytes.data() + 1;
    for (int64_t i = 0; i < 3; ++i) {
      WriteElement(unaligned, type, i, 1.5f * static_cast<float>(i - 1));
    }
    for (int64_t i = 0; i < 3; ++i) {
      EXPECT_EQ(ReadElement(unaligned, type, i), 1.5f * static_cast<float>(i - 1));
    }
    EXPECT_EQ(bytes[0], '\x55');
    EXPECT_EQ(bytes[static_cast<size_t>(1 + 3 * DTypeBytes(type))], '\x55');
  }
}

}  // namespace
}  // namespace adaattn

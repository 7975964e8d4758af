#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/format/nested_code.h"
#include "kernels/format/page_layout.h"
#include "kernels/policy/bound.h"

namespace adaattn {
namespace {

// Keys in one dimension, where every choice can be made adversarially.
struct Key {
  double weight = 0, value = 0;
  size_t term = 0;
};

struct World {
  std::vector<Key> keys;
  std::vector<BoundTerm> terms;
  double output = 0;
};

World RandomWorld(std::mt19937* random) {
  std::uniform_real_distribution<double> unit(0, 1);
  World world;
  const size_t num_terms = 1 + (*random)() % 5;
  world.terms.resize(num_terms);
  double sum = 0;
  for (size_t term = 0; term < num_terms; ++term) {
    world.terms[term].score_error = std::pow(unit(*random), 3) * 3;
    world.terms[term].value_error = unit(*random) < 0.5 ? 0 : unit(*random);
    for (size_t i = 0; i < 1 + (*random)() % 6; ++i) {
      world.keys.push_back({std::exp(6 * unit(*random)), 4 * unit(*random) - 2, term});
      sum += world.keys.back().weight;
    }
  }
  for (Key& key : world.keys) {
    key.weight /= sum;
    world.output += key.weight * key.value;
  }
  for (const Key& key : world.keys) {
    BoundTerm& term = world.terms[key.term];
    term.mass += key.weight;
    term.distance = std::max(term.distance, std::abs(key.value - world.output));
  }
  return world;
}

// The largest true output: keys above it at their most, keys below it at their least.
double WorstOutput(const World& world, double sign) {
  double worst = 0;
  for (int round = 0; round < 200; ++round) {
    double sum = 0, total = 0;
    for (const Key& key : world.keys) {
      const BoundTerm& term = world.terms[key.term];
      const double g = sign * (key.value - world.output) + term.value_error;
      const double weight = key.weight * std::exp(g > worst ? term.score_error : -term.score_error);
      sum += weight * g;
      total += weight;
    }
    worst = sum / total;
  }
  return worst;
}

TEST(OutputErrorBoundTest, CoversTheWorstThereIs) {
  std::mt19937 random(3);
  double tightest = 0;
  for (int i = 0; i < 3000; ++i) {
    const World world = RandomWorld(&random);
    const double bound = OutputErrorBound(world.terms);
    for (const double sign : {1.0, -1.0}) {
      const double worst = WorstOutput(world, sign);
      ASSERT_LE(worst, bound * (1 + 1e-8) + 1e-12) << "world " << i;
      if (bound > 0) tightest = std::max(tightest, worst / bound);
    }
  }
  EXPECT_GT(tightest, 0.9);
}

TEST(OutputErrorBoundTest, IsTheHyperbolicTangentOfOneError) {
  for (const double error : {0.001, 0.1, 0.5, 2.0}) {
    const std::vector<BoundTerm> terms = {{0.25, error, 0, 3}, {0.75, error, 0, 3}};
    EXPECT_NEAR(OutputErrorBound(terms), 3 * std::tanh(error), 1e-7);
  }
}

TEST(OutputErrorBoundTest, KnownWeightsLeaveTheValues) {
  EXPECT_NEAR(OutputErrorBound({{0.5, 0, 0.1, 5}, {0.5, 0, 0.3, 5}}), 0.2, 1e-7);
  EXPECT_NEAR(OutputErrorBound({{1, 0, 0, 7}}), 0, 1e-7);
}

TEST(OutputErrorBoundTest, UnknownWeightsLeaveTheHull) {
  const double infinity = std::numeric_limits<double>::infinity();
  EXPECT_NEAR(OutputErrorBound({{0.5, infinity, 0.5, 2}, {0.5, 0, 0, 1}}), 2.5, 1e-6);
  EXPECT_EQ(OutputErrorBound({{0.5, 0, infinity, 2}, {0.5, 0, 0, 1}}), infinity);
  EXPECT_EQ(OutputErrorBound({}), 0);
}

// What a planner asks for one bound at a time is what the search for the least one finds.
TEST(BoundHoldsTest, FromTheLeastBoundOn) {
  std::mt19937 random(5);
  for (int i = 0; i < 1000; ++i) {
    const World world = RandomWorld(&random);
    std::vector<PreparedTerm> terms;
    BoundSums sums;
    for (const BoundTerm& term : world.terms) {
      terms.push_back(PrepareTerm(term));
      AddBoundTerm(terms.back(), &sums);
    }
    const auto excess = [&terms](double multiplier, double bound) {
      double sum = 0;
      for (const PreparedTerm& term : terms) sum += ExcessOfTerm(term, multiplier, bound);
      return sum;
    };
    const double least = LeastBound(sums, excess), step = 1e-6 * sums.trivial;
    EXPECT_TRUE(BoundHolds(sums, excess, least + step)) << "world " << i;
    if (least > step) {
      EXPECT_FALSE(BoundHolds(sums, excess, least - step)) << "world " << i;
    }
    if (step > 0) {
      EXPECT_FALSE(BoundHolds(sums, excess, -step));
    }
  }
}

TEST(BoundHoldsTest, NothingHoldsWhereNothingIsKnown) {
  const auto excess = [](double, double) { return -1.0; };
  BoundSums sums;
  sums.trivial = std::numeric_limits<double>::infinity();
  EXPECT_FALSE(BoundHolds(sums, excess, 1e9));
  EXPECT_TRUE(BoundHolds(BoundSums(), excess, 0));
}

TEST(MostErrorTest, IsTheLargestWithinTheBound) {
  for (const double bound : {0.001, 0.1, 1.0}) {
    const double error = MostError(bound, 3);
    EXPECT_NEAR(RelativeBound(error, 3), bound, 1e-12);
    EXPECT_GT(RelativeBound(error * (1 + 1e-9), 3), bound);
  }
  EXPECT_EQ(MostError(0.1, 0), 0);
}

TEST(BoundLseTest, TakesAllErrorsOneWay) {
  const LseBound bound = BoundLse(std::vector<BoundTerm>{{0.5, 1, 0, 0}, {0.5, 0, 0, 0}});
  EXPECT_NEAR(bound.above, std::log(0.5 * std::exp(1) + 0.5), 1e-12);
  EXPECT_NEAR(bound.below, -std::log(0.5 * std::exp(-1) + 0.5), 1e-12);
}

TEST(RelativeBoundTest, TakesTheLeastTruthThereCanBe) {
  EXPECT_DOUBLE_EQ(RelativeBound(0.5, 2), 0.5 / 1.5);
  EXPECT_EQ(RelativeBound(0, 0), 0);
  EXPECT_TRUE(std::isinf(RelativeBound(2, 2)));
  EXPECT_TRUE(std::isinf(RelativeBound(std::numeric_limits<double>::quiet_NaN(), 2)));
}

TEST(CodeErrorTest, CoversEveryValueOfARange) {
  std::mt19937 random(4);
  for (const int scale : {0, 1, 100, 161, 254}) {
    const float range = RangeFromScale(static_cast<uint8_t>(scale));
    std::uniform_real_distribution<float> values(-range, range);
    for (int i = 0; i < 20000; ++i) {
      const float value = i < 2 ? (i == 0 ? range : -range) : values(random);
      const uint32_t code = EncodeNested(value, range);
      for (int32_t bits = 2; bits <= 8; bits += 2) {
        const double read = DecodeNested(code >> (8 - bits), bits, range);
        ASSERT_LE(std::abs(read - value), CodeError(bits) * range) << value << " at " << bits;
      }
    }
  }
}

TEST(RangesTest, SumWhatThePageSays) {
  const float query[2] = {3, -2};
  const uint8_t scales[2] = {kRangeOffset, kRangeOffset + 4};  // ranges 1 and 2
  const KeyRanges keys = SumKeyRanges(query, scales, 2);
  EXPECT_DOUBLE_EQ(keys.weighted, 7);
  EXPECT_DOUBLE_EQ(keys.largest, 4);
  EXPECT_DOUBLE_EQ(keys.sum, 3);
  EXPECT_DOUBLE_EQ(keys.squares, 5);
  EXPECT_DOUBLE_EQ(keys.query_sum, 5);
  EXPECT_FALSE(keys.saturated);
  std::vector<uint8_t> values(kPageTokens * 2, kRangeOffset);  // head_dim 128: two groups
  values[6] = kRangeOffset + 4;
  values[9] = kRangeOffset + 4;
  const ValueRanges ranges = SumValueRanges(values.data(), 128);
  EXPECT_DOUBLE_EQ(ranges.token, std::sqrt(64 * 5.0));
  EXPECT_DOUBLE_EQ(ranges.page, std::sqrt(64 * 8.0));
  values[0] = 255;
  EXPECT_TRUE(SumValueRanges(values.data(), 128).saturated);
}

}  // namespace
}  // namespace adaattn

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "client/trace.h"
#include "kernels/format/float_types.h"
#include "kernels/reference/attention_f64.h"
#include "kernels/reference/dense_quantizers.h"
#include "unit/format_testing.h"

namespace adaattn {
namespace {

using ::testing::Each;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

AttentionF64Params Params(AttentionShape shape, int64_t kv_len, int32_t q_len, int64_t q_start) {
  AttentionF64Params params;
  params.shape = shape;
  params.kv_len = kv_len;
  params.q_len = q_len;
  params.q_start = q_start;
  params.softmax_scale = 0.5;
  return params;
}

TEST(AttentionF64Test, AgreesWithAnswersComputedElsewhere) {
  for (const char* name : {"qwen25-coder-1.5b-layer14-8k", "smollm2-135m-layer15-8k"}) {
    const Trace trace = LoadTrace(std::string("data/") + name + ".safetensors").value();
    const AttentionShape shape = trace.shape;
    const int32_t d = shape.head_dim;
    for (const int32_t row : {0, 37, 63}) {
      const int64_t kv_len = trace.positions[static_cast<size_t>(row)] + 1;
      std::vector<float> k, v, q;
      for (int64_t t = 0; t < kv_len; ++t) {
        for (int32_t h = 0; h < shape.num_kv_heads; ++h) {
          for (int32_t c = 0; c < d; ++c) {
            const auto i = static_cast<size_t>((h * trace.num_tokens + t) * d + c);
            k.push_back(ToFloat(Fp16{trace.k[i]}));
            v.push_back(ToFloat(Fp16{trace.v[i]}));
          }
        }
      }
      for (int32_t h = 0; h < shape.num_q_heads; ++h) {
        for (int32_t c = 0; c < d; ++c) {
          q.push_back(ToFloat(Fp16{trace.q[(int64_t{h} * trace.num_rows + row) * d + c]}));
        }
      }
      AttentionF64Params params = Params(shape, kv_len, 1, kv_len - 1);
      params.softmax_scale = trace.softmax_scale;
      const AttentionF64Result result = AttentionF64(params, q.data(), k.data(), v.data());
      for (int32_t h = 0; h < shape.num_q_heads; ++h) {
        const int64_t head_row = int64_t{h} * trace.num_rows + row;
        const float* const expected = trace.expected_o.data() + head_row * d;
        EXPECT_LT(RelativeError({result.out.data() + int64_t{h} * d, static_cast<size_t>(d)},
                                std::vector<double>(expected, expected + d)),
                  1e-6);
        EXPECT_NEAR(result.lse[static_cast<size_t>(h)], trace.expected_lse[head_row], 1e-5);
      }
    }
  }
}

TEST(AttentionF64Test, SeesNothingInAnEmptyRange) {
  const AttentionShape shape{2, 1, 4};
  const std::vector<float> q(16, 1.0f), k(4, 1.0f);
  const AttentionF64Result empty =
      AttentionF64(Params(shape, 0, 2, 0), q.data(), k.data(), k.data());
  EXPECT_THAT(empty.out, Each(0.0));
  EXPECT_THAT(empty.lse, Each(-kInfinity));
  // A shard whose window ends before the row begins.
  AttentionF64Params params = Params(shape, 1, 1, 100);
  params.window = 50;
  EXPECT_THAT(AttentionF64(params, q.data(), k.data(), k.data()).lse, Each(-kInfinity));
}

TEST(AttentionF64Test, VisibleTokensAreCausalAndWindowed) {
  const auto range = [](int64_t position, int64_t kv_len, int64_t window) {
    const VisibleRange visible = VisibleTokens(position, kv_len, window);
    return std::make_pair(visible.begin, visible.end);
  };
  EXPECT_EQ(range(5, 10, 0), std::make_pair(int64_t{0}, int64_t{6}));
  EXPECT_EQ(range(5, 10, 3), std::make_pair(int64_t{3}, int64_t{6}));
  EXPECT_EQ(range(20, 10, 0), std::make_pair(int64_t{0}, int64_t{10}));
  EXPECT_EQ(range(20, 10, 12), std::make_pair(int64_t{9}, int64_t{10}));
}

TEST(AttentionF64Test, MaskedTokensDoNotMatterEvenAsNan) {
  const AttentionShape shape{2, 1, 4};
  const std::vector<float> q = RandomNormal(41, 8);
  std::vector<float> k = RandomNormal(42, 40), v = RandomNormal(43, 40);
  AttentionF64Params params = Params(shape, 10, 1, 6);
  params.window = 4;
  const AttentionF64Result clean = AttentionF64(params, q.data(), k.data(), v.data());
  for (const size_t token : {0, 1, 2, 7, 8, 9}) {
    for (size_t c = 0; c < 4; ++c) k[token * 4 + c] = v[token * 4 + c] = NAN;
  }
  const AttentionF64Result poisoned = AttentionF64(params, q.data(), k.data(), v.data());
  EXPECT_EQ(poisoned.out, clean.out);
  EXPECT_EQ(poisoned.lse, clean.lse);
}

TEST(AttentionF64Test, SoftCapBendsScores) {
  const AttentionShape shape{1, 1, 1};
  const float q = 4.0f;
  const std::vector<float> k = {3.0f, -1.0f}, v = {1.0f, 0.0f};
  AttentionF64Params params = Params(shape, 2, 1, 1);
  params.softcap = 2.0;
  const AttentionF64Result result = AttentionF64(params, &q, k.data(), v.data());
  const double a = 2 * std::tanh(6.0 / 2), b = 2 * std::tanh(-2.0 / 2);
  EXPECT_NEAR(result.lse[0], std::log(std::exp(a) + std::exp(b)), 1e-12);
  EXPECT_NEAR(result.out[0], 1 / (1 + std::exp(b - a)), 1e-12);
}

TEST(AttentionF64Test, QHeadsShareTheirGroupsKvHead) {
  const AttentionShape grouped{4, 2, 8}, single{1, 1, 8};
  const std::vector<float> q = RandomNormal(44, 32), k = RandomNormal(45, 5 * 16);
  const std::vector<float> v = RandomNormal(46, 5 * 16);
  const AttentionF64Result all =
      AttentionF64(Params(grouped, 5, 1, 4), q.data(), k.data(), v.data());
  for (size_t head = 0; head < 4; ++head) {
    std::vector<float> own_k, own_v;
    for (size_t t = 0; t < 5; ++t) {
      for (size_t c = 0; c < 8; ++c) {
        own_k.push_back(k[t * 16 + head / 2 * 8 + c]);
        own_v.push_back(v[t * 16 + head / 2 * 8 + c]);
      }
    }
    const AttentionF64Result one =
        AttentionF64(Params(single, 5, 1, 4), q.data() + head * 8, own_k.data(), own_v.data());
    EXPECT_EQ(one.lse[0], all.lse[head]);
    EXPECT_TRUE(std::equal(one.out.begin(), one.out.end(), all.out.begin() + 8 * head));
  }
}

TEST(DenseQuantizersTest, RoundTripErrorsAreThoseOfTheirSteps) {
  const std::vector<float> exact = RandomNormal(47, 64 * 128);
  const auto error = [&exact](const std::vector<float>& actual) {
    return RelativeError(std::vector<double>(actual.begin(), actual.end()),
                         std::vector<double>(exact.begin(), exact.end()));
  };
  std::vector<float> fp8 = exact, int8 = exact, int4 = exact, int8_head = exact;
  RoundTripFp8(absl::MakeSpan(fp8), 1.0f);
  RoundTripInt(absl::MakeSpan(int8), 128, 8, ScaleSharing::kToken);
  RoundTripInt(absl::MakeSpan(int8_head), 128, 8, ScaleSharing::kHead);
  RoundTripInt(absl::MakeSpan(int4), 128, 4, ScaleSharing::kToken);
  EXPECT_NEAR(error(fp8), 0.026, 0.003);    // 3 bits of mantissa
  EXPECT_NEAR(error(int8), 0.0062, 0.001);  // steps of max / 127, max about 2.8
  EXPECT_NEAR(error(int4), 0.115, 0.02);
  EXPECT_GT(error(int8_head), error(int8));
}

TEST(DenseQuantizersTest, KeepsZerosAndTheLargestValue) {
  std::vector<float> values = {0.0f, -5.0f, 0.0f, 0.0f};
  for (const int32_t bits : {4, 8}) {
    RoundTripInt(absl::MakeSpan(values), 2, bits, ScaleSharing::kToken);
    EXPECT_EQ(values[0], 0.0f);
    EXPECT_NEAR(values[1], -5.0f, 0.01f);
    EXPECT_EQ(values[3], 0.0f);
  }
  EXPECT_FLOAT_EQ(Fp8Scale(values), -values[1] / 448);
  EXPECT_EQ(Fp8Scale({}), 1.0f);
}

TEST(DenseQuantizersTest, Fp8SaturatesUnlessScaled) {
  std::vector<float> values = {1000.0f, 1.0f};
  const float scale = Fp8Scale(values);
  std::vector<float> scaled = values;
  RoundTripFp8(absl::MakeSpan(values), 1.0f);
  EXPECT_EQ(values[0], 448.0f);
  RoundTripFp8(absl::MakeSpan(scaled), scale);
  EXPECT_FLOAT_EQ(scaled[0], 1000.0f);
}

TEST(DenseQuantizersTest, BytesCountTheScales) {
  EXPECT_EQ(DenseQuantizedTokenBytes(128, 8, ScaleSharing::kToken), 260);
  EXPECT_EQ(DenseQuantizedTokenBytes(128, 4, ScaleSharing::kToken), 132);
  EXPECT_EQ(DenseQuantizedTokenBytes(128, 8, ScaleSharing::kHead), 256);
}

}  // namespace
}  // namespace adaattn

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>

#include "client/trace.h"

namespace adaattn {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::json;

// A small valid trace: 2 q heads, 1 kv head, 2 rows, 4 tokens, head_dim 2.
struct TraceFile {
  Json header;
  std::string data;

  TraceFile() {
    Add("q", "F16", {2, 2, 2}, 2);
    Add("k", "F16", {1, 4, 2}, 2);
    Add("v", "F16", {1, 4, 2}, 2);
    Add("positions", "I32", {2}, 4);
    Add("expected_o", "F32", {2, 2, 2}, 4);
    Add("expected_lse", "F32", {2, 2}, 4);
    SetPositions(1, 3);
    header["__metadata__"] = {
        {"model", "made up"}, {"layer", "7"}, {"softmax_scale", "0.5"}, {"tokens", "4"}};
  }
  void Add(const std::string& name, const std::string& dtype, const std::vector<int>& shape,
           int element_bytes) {
    size_t bytes = static_cast<size_t>(element_bytes);
    for (const int dimension : shape) bytes *= static_cast<size_t>(dimension);
    header[name] = {
        {"dtype", dtype}, {"shape", shape}, {"data_offsets", {data.size(), data.size() + bytes}}};
    for (size_t i = 0; i < bytes; ++i) data.push_back(static_cast<char>(data.size() % 120));
  }
  void SetPositions(int32_t first, int32_t second) {
    char* const at = data.data() + header["positions"]["data_offsets"][0].get<size_t>();
    std::memcpy(at, &first, 4);
    std::memcpy(at + 4, &second, 4);
  }
  std::string Bytes() const { return WithHeader(header.dump()); }
  std::string WithHeader(const std::string& text) const {
    std::string bytes(8, '\0');
    const uint64_t length = text.size();
    std::memcpy(bytes.data(), &length, 8);
    return bytes + text + data;
  }
};

void ExpectRefused(const std::string& bytes, const std::string& message) {
  const absl::StatusOr<Trace> trace = ParseTrace(bytes);
  EXPECT_EQ(trace.status().code(), absl::StatusCode::kInvalidArgument) << message;
  EXPECT_THAT(std::string(trace.status().message()), HasSubstr(message));
}

TEST(TraceTest, ReadsEveryFieldOfASmallFile) {
  const TraceFile file;
  const absl::StatusOr<Trace> trace = ParseTrace(file.Bytes());
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->model, "made up");
  EXPECT_EQ(trace->layer, 7);
  EXPECT_EQ(trace->softmax_scale, 0.5);
  EXPECT_EQ(trace->shape, (AttentionShape{2, 1, 2}));
  EXPECT_EQ(trace->num_tokens, 4);
  EXPECT_EQ(trace->num_rows, 2);
  EXPECT_THAT(trace->positions, ::testing::ElementsAre(1, 3));
  ASSERT_EQ(trace->k.size(), 8u);
  EXPECT_EQ(0, std::memcmp(trace->k.data(), file.data.data() + 16, 16));
  EXPECT_EQ(trace->v.size(), 8u);
  EXPECT_EQ(trace->expected_o.size(), 8u);
  EXPECT_EQ(trace->expected_lse.size(), 4u);
}

TEST(TraceTest, ReadsTheCapturedTraces) {
  const absl::StatusOr<Trace> qwen = LoadTrace("data/qwen25-coder-1.5b-layer14-8k.safetensors");
  ASSERT_TRUE(qwen.ok()) << qwen.status();
  EXPECT_EQ(qwen->shape, (AttentionShape{12, 2, 128}));
  EXPECT_EQ(qwen->layer, 14);
  EXPECT_NEAR(qwen->softmax_scale, 1 / std::sqrt(128.0), 1e-12);
  EXPECT_EQ(qwen->num_tokens, 8192);
  EXPECT_EQ(qwen->num_rows, 64);
  EXPECT_EQ(qwen->positions.back(), 8191);
  const absl::StatusOr<Trace> smol = LoadTrace("data/smollm2-135m-layer15-8k.safetensors");
  ASSERT_TRUE(smol.ok()) << smol.status();
  EXPECT_EQ(smol->shape, (AttentionShape{9, 3, 64}));
}

TEST(TraceTest, NamesThePathInItsErrors) {
  EXPECT_EQ(LoadTrace("data/no_such_file").status().code(), absl::StatusCode::kNotFound);
  const absl::Status status = LoadTrace("CMakeLists.txt").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("CMakeLists.txt: header"));
}

TEST(TraceTest, RefusesBrokenHeaders) {
  const TraceFile file;
  ExpectRefused("", "0 bytes");
  ExpectRefused(std::string(7, 'x'), "7 bytes");
  ExpectRefused(std::string(8, '\xff'), "exceeds");
  ExpectRefused(file.WithHeader("{\"q\": "), "not a JSON object");
  ExpectRefused(file.WithHeader("[1, 2]"), "not a JSON object");
  ExpectRefused(file.WithHeader(std::string(5000, '[')), "not a JSON object");
  ExpectRefused(file.WithHeader("{}"), "q: tensor is missing");
}

TEST(TraceTest, RefusesTensorsThatDoNotFitTheFile) {
  const auto with = [](const std::string& tensor, const std::string& field, const Json& value) {
    TraceFile file;
    file.header[tensor][field] = value;
    return file.Bytes();
  };
  ExpectRefused(with("k", "dtype", "BF16"), "k: dtype must be F16");
  ExpectRefused(with("k", "dtype", 3), "k: dtype must be F16");
  ExpectRefused(with("k", "shape", {4, 2}), "k: shape must have 3 dimensions");
  ExpectRefused(with("k", "shape", {1, -4, 2}), "k: every dimension");
  ExpectRefused(with("k", "shape", {0, 4, 2}), "k: every dimension");
  ExpectRefused(with("k", "shape", {1, 4.5, 2}), "k: every dimension");
  ExpectRefused(with("k", "shape", {1, 5, 2}), "do not hold shape [1, 5, 2]");
  ExpectRefused(with("k", "shape", {1 << 24, 1 << 24, 1 << 24}), "do not hold shape");
  ExpectRefused(with("k", "shape", {1, 2, 4}), "k: shape is [1, 2, 4]; must be [1, 2, 2]");
  ExpectRefused(with("v", "shape", {1, 2, 4}), "v: shape is [1, 2, 4]; must be [1, 4, 2]");
  ExpectRefused(with("v", "data_offsets", {0, 1 << 30}), "leave the file's");
  ExpectRefused(with("v", "data_offsets", {32, 16}), "leave the file's");
  ExpectRefused(with("v", "data_offsets", {-16, 0}), "two offsets");
  ExpectRefused(with("v", "data_offsets", {0, 15}), "15 bytes do not hold");
  ExpectRefused(with("v", "data_offsets", {0, 18446744073709551615ull}), "leave the file's");
}

TEST(TraceTest, RefusesMetadataAndPositionsThatMakeNoSense) {
  const auto with = [](const std::string& field, const Json& value) {
    TraceFile file;
    file.header["__metadata__"][field] = value;
    return file.Bytes();
  };
  ExpectRefused(with("softmax_scale", "nan"), "softmax_scale: is 'nan'");
  ExpectRefused(with("softmax_scale", "-1"), "softmax_scale: is '-1'");
  ExpectRefused(with("softmax_scale", 0.5), "missing or not a string");
  ExpectRefused(with("layer", "x"), "layer: is 'x'");
  ExpectRefused(with("tokens", "5"), "tokens: is '5'; k holds 4");
  TraceFile file;
  file.header.erase("__metadata__");
  ExpectRefused(file.Bytes(), "__metadata__: missing");
  TraceFile positions;
  positions.SetPositions(-1, 3);
  ExpectRefused(positions.Bytes(), "positions[0]: is -1; must be in [0, 4)");
  positions.SetPositions(1, 4);
  ExpectRefused(positions.Bytes(), "positions[1]: is 4; must be in [2, 4)");
  positions.SetPositions(2, 2);
  ExpectRefused(positions.Bytes(), "positions[1]: is 2");
}

TEST(TraceTest, RefusesHeadsThatDoNotGroup) {
  TraceFile file;
  file.header["k"]["shape"] = {2, 2, 2};
  file.header["v"]["shape"] = {2, 2, 2};
  file.header["q"]["shape"] = {1, 4, 2};
  file.header["expected_o"]["shape"] = {1, 4, 2};
  file.header["expected_lse"]["shape"] = {1, 4};
  ExpectRefused(file.Bytes(), "positions: shape is [2]; must be [4]");
  TraceFile heads;
  heads.header["k"]["shape"] = {4, 1, 2};
  heads.header["v"]["shape"] = {4, 1, 2};
  ExpectRefused(heads.Bytes(), "q: 2 heads; must be a multiple of k's 4");
}

TEST(TraceTest, SurvivesTruncationAndRandomDamage) {
  const std::string bytes = TraceFile().Bytes();
  for (size_t length = 0; length < bytes.size(); ++length) {
    EXPECT_FALSE(ParseTrace(absl::string_view(bytes).substr(0, length)).ok()) << length;
  }
  std::mt19937 random(31);
  int accepted = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string damaged = bytes;
    for (int i = 0; i < 1 + round % 4; ++i) {
      damaged[random() % damaged.size()] = static_cast<char>(random() % 256);
    }
    accepted += ParseTrace(damaged).ok() ? 1 : 0;  // damage to the numbers alone is no error
  }
  EXPECT_LT(accepted, 3000);
}

}  // namespace
}  // namespace adaattn

#ifndef ADAATTN_TESTS_INTEGRATION_CLIENT_ROWS_H_
#define ADAATTN_TESTS_INTEGRATION_CLIENT_ROWS_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "client/client.h"

namespace adaattn::client {

inline constexpr int32_t kQHeads = 4;
inline constexpr int32_t kKvHeads = 2;
inline constexpr int32_t kHeadDim = 64;

// A client, made by the fixture that derives from this, with small FP32 sessions and random rows.
class ClientRows : public ::testing::Test {
 protected:
  std::unique_ptr<Session> Open(int32_t num_layers = 1, int64_t start_position = 0) {
    SessionOptions options;
    options.model = {num_layers, kQHeads, kKvHeads, kHeadDim, 0};
    options.page_format = PageFormat::kF32;
    options.start_position = start_position;
    auto session = client_->OpenSession(options);
    EXPECT_TRUE(session.ok()) << session.status();
    return *std::move(session);
  }

  std::vector<float> Random(int64_t size) {
    std::vector<float> values(size);
    std::normal_distribution<float> normal;
    for (float& value : values) value = normal(random_);
    return values;
  }

  static TensorView Rows(absl::Span<const float> values, int32_t heads) {
    const auto rows = static_cast<int64_t>(values.size()) / heads / kHeadDim;
    return MakeView<float>(DType::kF32, {rows, heads, kHeadDim}, values);
  }

  std::mt19937 random_{20260102};
  std::unique_ptr<Client> client_;
};

}  // namespace adaattn::client

#endif  // ADAATTN_TESTS_INTEGRATION_CLIENT_ROWS_H_

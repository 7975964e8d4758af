#ifndef ADAATTN_TESTS_INTEGRATION_CLIENT_FIXTURE_H_
#define ADAATTN_TESTS_INTEGRATION_CLIENT_FIXTURE_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "client/client.h"
#include "tests/integration/client_fake_service.h"

namespace adaattn::client {

inline constexpr int32_t kQHeads = 4;
inline constexpr int32_t kKvHeads = 2;
inline constexpr int32_t kHeadDim = 64;

// A client of a FakeServer that waits for nothing between attempts.
class ClientTest : public ::testing::Test {
 protected:
  ClientTest() { client_ = MakeClient(1); }

  std::unique_ptr<Client> MakeClient(int32_t num_channels) {
    ClientOptions options;
    options.address = server_.address();
    options.num_channels = num_channels;
    options.route_key = "test-route";
    options.retry.sleep = [this](absl::Duration wait) {
      absl::MutexLock lock(&mutex_);
      waits_.push_back(wait);
    };
    auto client = Client::Create(options);
    EXPECT_TRUE(client.ok()) << client.status();
    return *std::move(client);
  }

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

  static TensorView Rows(const std::vector<float>& values, int32_t heads) {
    const auto rows = static_cast<int64_t>(values.size()) / heads / kHeadDim;
    return MakeView<float>(DType::kF32, {rows, heads, kHeadDim}, values);
  }

  std::vector<absl::Duration> waits() {
    absl::MutexLock lock(&mutex_);
    return waits_;
  }

  FakeService* fake() { return server_.service(); }

  FakeServer server_;
  std::unique_ptr<Client> client_;
  std::mt19937 random_{20260102};
  absl::Mutex mutex_;
  std::vector<absl::Duration> waits_;
};

}  // namespace adaattn::client

#endif  // ADAATTN_TESTS_INTEGRATION_CLIENT_FIXTURE_H_

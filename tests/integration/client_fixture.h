#ifndef ADAATTN_TESTS_INTEGRATION_CLIENT_FIXTURE_H_
#define ADAATTN_TESTS_INTEGRATION_CLIENT_FIXTURE_H_

#include <memory>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "client/client.h"
#include "tests/integration/client_fake_service.h"
#include "tests/integration/client_rows.h"

namespace adaattn::client {

// A client of a FakeServer that waits for nothing between attempts.
class ClientTest : public ClientRows {
 protected:
  ClientTest() { client_ = MakeClient(1); }
  ~ClientTest() override { client_.reset(); }  // Before its server.

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

  std::vector<absl::Duration> waits() {
    absl::MutexLock lock(&mutex_);
    return waits_;
  }

  FakeService* fake() { return server_.service(); }

  FakeServer server_;
  absl::Mutex mutex_;
  std::vector<absl::Duration> waits_;
};

}  // namespace adaattn::client

#endif  // ADAATTN_TESTS_INTEGRATION_CLIENT_FIXTURE_H_

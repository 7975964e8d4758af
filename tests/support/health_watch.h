#ifndef ADAATTN_TESTS_SUPPORT_HEALTH_WATCH_H_
#define ADAATTN_TESTS_SUPPORT_HEALTH_WATCH_H_

#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/codegen/byte_buffer.h>
#include <grpcpp/impl/codegen/sync_stream.h>

#include <memory>
#include <string>
#include <vector>

namespace adaattn {

// One grpc.health.v1.Health/Watch call. Debian packages no generated code of that service, so its
// two messages are written and read as bytes: {string service = 1} and {enum status = 1}.
class HealthWatch {
 public:
  enum Status { kEnded = -1, kUnknown = 0, kServing = 1, kNotServing = 2, kServiceUnknown = 3 };

  // `service`: shorter than 128 characters.
  HealthWatch(std::shared_ptr<grpc::Channel> channel, const std::string& service)
      : channel_(std::move(channel)) {
    const grpc::Slice slice("\x0a" + std::string(1, static_cast<char>(service.size())) + service);
    const grpc::ByteBuffer request(&slice, 1);
    const grpc::internal::RpcMethod method("/grpc.health.v1.Health/Watch",
                                           grpc::internal::RpcMethod::SERVER_STREAMING);
    reader_.reset(grpc::internal::ClientReaderFactory<grpc::ByteBuffer>::Create<grpc::ByteBuffer>(
        channel_.get(), method, &context_, request));
  }
  ~HealthWatch() {
    context_.TryCancel();
    grpc::ByteBuffer rest;
    while (reader_->Read(&rest)) {
    }
    (void)reader_->Finish();
  }

  // The next status; waits for it.
  Status Next() {
    grpc::ByteBuffer message;
    if (!reader_->Read(&message)) return kEnded;
    std::vector<grpc::Slice> slices;
    if (!message.Dump(&slices).ok() || slices.empty()) return kUnknown;
    return slices[0].size() == 2 ? static_cast<Status>(slices[0].begin()[1]) : kUnknown;
  }

 private:
  const std::shared_ptr<grpc::Channel> channel_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<grpc::ByteBuffer>> reader_;
};

}  // namespace adaattn

#endif  // ADAATTN_TESTS_SUPPORT_HEALTH_WATCH_H_

// adaattn-health: asks a server by grpc.health.v1 and says by its exit code what it heard. For
// probes in images without a shell; plaintext, so over loopback or the server's Unix socket.

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "client/cli_args.h"

namespace adaattn::client {
namespace {

constexpr char kMethod[] = "/grpc.health.v1.Health/Check";
constexpr char kExitCodes[] =
    "Exit codes: 0 SERVING; 1 another status, or no answer in time; 2 wrong arguments.\n";

// HealthCheckRequest: the service's name is field 1. Names are shorter than 128 bytes.
std::string EncodeRequest(const std::string& service) {
  if (service.empty()) return "";
  return std::string("\x0a") + static_cast<char>(service.size()) + service;
}

// HealthCheckResponse: the status is field 1, a varint below 128; left out when 0 (UNKNOWN).
int DecodeStatus(const std::string& reply) {
  return reply.size() >= 2 && reply[0] == '\x08' ? reply[1] : 0;
}

grpc::Status Check(const std::string& address, const std::string& service,
                   std::chrono::milliseconds timeout, std::string* reply) {
  grpc::GenericStub stub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + timeout);
  context.set_wait_for_ready(false);
  const grpc::Slice slice(EncodeRequest(service));
  const grpc::ByteBuffer request(&slice, 1);
  grpc::CompletionQueue queue;
  const std::unique_ptr<grpc::GenericClientAsyncResponseReader> call =
      stub.PrepareUnaryCall(&context, kMethod, request, &queue);
  grpc::ByteBuffer answer;
  grpc::Status status;
  call->StartCall();
  call->Finish(&answer, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  std::vector<grpc::Slice> slices;
  if (status.ok() && answer.Dump(&slices).ok()) {
    for (const grpc::Slice& part : slices) {
      reply->append(reinterpret_cast<const char*>(part.begin()), part.size());
    }
  }
  return status;
}

int Main(const std::vector<std::string>& arguments) {
  const std::vector<Flag> flags = {
      {"address", Flag::Type::kString, "127.0.0.1:7470", "host:port or unix:path"},
      {"service", Flag::Type::kString, "", "service asked about; empty = the whole server"},
      {"timeout", Flag::Type::kDouble, "2", "seconds"},
      {"any-status", Flag::Type::kBool, "false", "any answer will do: alive rather than ready"},
      {"help", Flag::Type::kBool, "false", "print this"}};
  const absl::StatusOr<Args> args = Args::Parse(arguments, flags);
  if (!args.ok() || !args->positional().empty() || args->String("service").size() > 127) {
    std::fprintf(stderr, "adaattn-health: %s\n%s",
                 args.ok() ? "takes flags only" : std::string(args.status().message()).c_str(),
                 kExitCodes);
    return 2;
  }
  if (args->Bool("help")) {
    std::printf("usage: adaattn-health [--flag=value ...]\n\n%s\n%s", FlagHelp(flags).c_str(),
                kExitCodes);
    return 0;
  }
  const std::chrono::milliseconds timeout(static_cast<int64_t>(args->Double("timeout") * 1000));
  std::string reply;
  const grpc::Status status =
      Check(args->String("address"), args->String("service"), timeout, &reply);
  if (!status.ok()) {
    std::fprintf(stderr, "no answer: %s\n", status.error_message().c_str());
    return 1;
  }
  static constexpr const char* kNames[] = {"UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"};
  const int heard = DecodeStatus(reply);
  std::printf("%s\n", heard >= 0 && heard < 4 ? kNames[heard] : kNames[0]);
  return heard == 1 || args->Bool("any-status") ? 0 : 1;
}

}  // namespace
}  // namespace adaattn::client

int main(int argc, char** argv) {
  return adaattn::client::Main(std::vector<std::string>(argv + 1, argv + argc));
}

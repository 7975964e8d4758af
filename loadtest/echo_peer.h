#ifndef ADAATTN_LOADTEST_ECHO_PEER_H_
#define ADAATTN_LOADTEST_ECHO_PEER_H_

// The other ends of the echo benchmark, and the raw client that talks to them.

#include <grpcpp/client_context.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/client_callback.h>
#include <sys/types.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

namespace adaattn {

// Answers every message of every bidirectional stream with `answer_bytes` bytes (gRPC callback
// API). Serves until stdin is closed, which happens when the parent ends, however it ends. Returns
// the exit code.
int RunEchoServer(const std::string& address, size_t answer_bytes);

// A child process that gets SIGTERM, and is waited for, at the end. Its stdin is a pipe
// from here, its stdout goes nowhere.
class Child {
 public:
  // Errors: kNotFound when the program cannot be started.
  static absl::StatusOr<std::unique_ptr<Child>> Start(const std::vector<std::string>& command);
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  ~Child();

 private:
  Child(pid_t pid, int stdin_end) : pid_(pid), stdin_(stdin_end) {}

  const pid_t pid_;
  const int stdin_;
};

// A folder under the temp dir for Unix sockets, gone at the end.
class SocketFolder {
 public:
  SocketFolder();
  SocketFolder(const SocketFolder&) = delete;
  SocketFolder& operator=(const SocketFolder&) = delete;
  ~SocketFolder();

  bool ok() const { return !path_.empty(); }
  // "unix:" is not part of it.
  std::string Path(const std::string& name) const;

 private:
  std::string path_;
};

grpc::ByteBuffer ToBuffer(const std::string& bytes);
std::string ToString(const grpc::ByteBuffer& buffer);

// One bidirectional stream of raw bytes, one message at a time; waits for its server to come up.
class RawStream final : public grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  RawStream(const std::string& address, const std::string& method);
  ~RawStream() override;

  // Errors: kUnavailable when no answer comes within 30 s.
  absl::StatusOr<grpc::ByteBuffer> RoundTrip(const grpc::ByteBuffer& request);

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

 private:
  void Complete(bool ok);

  grpc::TemplatedGenericStub<grpc::ByteBuffer, grpc::ByteBuffer> stub_;
  grpc::ClientContext context_;
  grpc::ByteBuffer outgoing_, incoming_;
  absl::Mutex mutex_;
  int pending_ ABSL_GUARDED_BY(mutex_) = 0;  // operations of the round trip under way
  bool ok_ ABSL_GUARDED_BY(mutex_) = true;
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_ECHO_PEER_H_

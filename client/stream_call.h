#ifndef ADAATTN_CLIENT_STREAM_CALL_H_
#define ADAATTN_CLIENT_STREAM_CALL_H_

// One AttendStream RPC. Internal to the library.

#include <grpcpp/client_context.h>
#include <grpcpp/support/client_callback.h>

#include <deque>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "adaattn/v1/attention.grpc.pb.h"

namespace adaattn::client {

class Connection;

// Queues messages both ways, so that neither side's flow control can block the other. Threads: any,
// but the destructor, which cancels the call and waits for its end, never runs on a gRPC thread: it
// may drop the last reference to the channel, whose threads cannot join themselves.
class StreamCall : public grpc::ClientBidiReactor<v1::AttendRequest, v1::AttendResponse> {
 public:
  ~StreamCall() override;

  static std::shared_ptr<StreamCall> Start(Connection* connection, const std::string& route_key);

  // Queues `message`; ignored once the call is lost.
  void Write(std::shared_ptr<const v1::AttendRequest> message);
  void HalfClose();
  void Cancel();

  // The next answer. Errors: what ended the call (OK became kUnavailable, when the server ended it
  // by itself), and kDeadlineExceeded at `deadline`.
  absl::Status Read(absl::Time deadline, v1::AttendResponse* answer);

  // Waits for the end of the call, at most until `deadline`.
  absl::Status WaitDone(absl::Time deadline);

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

 private:
  StreamCall() = default;

  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ReleaseHold() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  grpc::ClientContext context_;
  v1::AttendResponse incoming_;  // belongs to gRPC between StartRead and OnReadDone
  absl::Mutex mutex_;
  std::deque<std::shared_ptr<const v1::AttendRequest>> outgoing_ ABSL_GUARDED_BY(mutex_);
  std::deque<v1::AttendResponse> answers_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool half_close_ ABSL_GUARDED_BY(mutex_) = false;  // asked for
  bool held_ ABSL_GUARDED_BY(mutex_) = true;         // writes may still be started
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace adaattn::client

#endif  // ADAATTN_CLIENT_STREAM_CALL_H_

#ifndef ADAATTN_CLIENT_ATTEND_STREAM_H_
#define ADAATTN_CLIENT_ATTEND_STREAM_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/types.h"

namespace adaattn::client {

class Connection;
class StreamCall;
struct PendingStep;

struct StreamOptions {
  std::string route_key;        // of all sessions on this stream; "" = the client's own
  int32_t max_unanswered = 64;  // steps in flight, >= 1
  // Longest wait for one answer before the stream counts as lost; zero = the client's deadline.
  absl::Duration answer_timeout;
};

// The answer to one message. `status` is that of the whole message; when it is OK, each sequence in
// `output` still has a status of its own.
struct StreamAnswer {
  uint64_t request_id = 0;
  absl::Status status;
  AttendOutput output;
};

// Attend messages over one stream, pipelined: answers come in the order of the messages.
//
// When the stream is lost (UNAVAILABLE, CANCELLED, or an answer that does not come in time) Receive
// opens a new one, after a backoff, and sends every unanswered message again as it was. The
// append-once rule makes that exact as long as at most one append per (session, layer) is
// unanswered; of several, the server may refuse all but the last with FAILED_PRECONDITION.
//
// Threads: one that sends and one that receives, or the same.
class AttendStream {
 public:
  AttendStream(const AttendStream&) = delete;
  AttendStream& operator=(const AttendStream&) = delete;
  ~AttendStream();  // cancels what is unanswered

  // Sends a message and returns its request id; never waits. The bytes are copied.
  // Errors: kResourceExhausted when max_unanswered are in flight (receive first);
  // kFailedPrecondition after Finish; the stream's error once it could not be restored.
  absl::StatusOr<uint64_t> Send(const AttendInput& input);

  // The same in two parts: everything but k and v now, those when they are computed.
  absl::StatusOr<uint64_t> SendQuery(const AttendInput& input);
  absl::Status SendKeyValue(uint64_t request_id, const TensorView& k, const TensorView& v);

  // The next answer. Errors: kFailedPrecondition when nothing is unanswered; what ended the stream
  // when its retries are used up, for this and every later call.
  absl::StatusOr<StreamAnswer> Receive();

  // Send, then Receive; the status of the message is the call's. A message that the server refused
  // with a retryable code is sent again. Requires: nothing else is unanswered.
  absl::StatusOr<AttendOutput> Attend(const AttendInput& input);

  // Half-closes and waits for the end of the stream. Requires: nothing is unanswered.
  absl::Status Finish();

 private:
  friend class Client;

  AttendStream(std::shared_ptr<Connection> connection, StreamOptions options);

  absl::StatusOr<uint64_t> SendMessage(const AttendInput& input, bool kv_follows);
  void Restart(absl::Duration wait);

  const std::shared_ptr<Connection> connection_;
  const StreamOptions options_;
  absl::Mutex mutex_;
  uint64_t last_request_id_ ABSL_GUARDED_BY(mutex_) = 0;
  std::deque<std::unique_ptr<PendingStep>> unanswered_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<StreamCall> call_ ABSL_GUARDED_BY(mutex_);
  absl::Status status_ ABSL_GUARDED_BY(mutex_);  // why the stream is over
};

}  // namespace adaattn::client

#endif  // ADAATTN_CLIENT_ATTEND_STREAM_H_

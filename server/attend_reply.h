#ifndef ADAATTN_SERVER_ATTEND_REPLY_H_
#define ADAATTN_SERVER_ATTEND_REPLY_H_

#include <grpcpp/support/byte_buffer.h>

#include <cstdint>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/attention_task.h"

namespace adaattn {

// The answer to a task that ran; its o and lse leave from the reply's own buffer.
grpc::ByteBuffer MakeAttendReply(uint64_t request_id, const AttentionTask& task);

// The answer to a message of which no session was found: no o, no lse.
grpc::ByteBuffer MakeUnfoundReply(uint64_t request_id, const AttentionTask& task);

// AttendStream: the answer to a message that failed as a whole.
grpc::ByteBuffer MakeErrorReply(uint64_t request_id, const absl::Status& status,
                                absl::Duration retry_after);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_ATTEND_REPLY_H_

#ifndef ADAATTN_SERVER_WIRE_H_
#define ADAATTN_SERVER_WIRE_H_

// Attend messages as they travel: tensors are found inside the received slices and never copied,
// answers leave as slices over the engine's own memory. Nothing here checks meaning (shapes, types,
// limits); attention_service does.

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "adaattn/v1/attention.pb.h"

namespace adaattn {

// The bytes of one tensor, in order, in as many pieces as the transport delivered. Pieces point
// into the slices of their message and are never empty.
struct WireBytes {
  absl::InlinedVector<absl::Span<const std::byte>, 2> pieces;
  int64_t size = 0;
};

// One received AttendRequest. Movable; moving keeps every piece valid, because the slices stay
// where they are on the heap.
struct AttendMessage {
  v1::AttendRequest header;  // all fields; q, k and v without `data`
  WireBytes q, k, v;         // what their `data` held; empty where absent
  std::vector<grpc::Slice> slices;
  std::vector<grpc::Slice> kv_slices;  // of k and v, where they came in a message of their own
};

// Parses `buffer`, which may be consumed. Equal to the generated parser on every message that one
// accepts, with one exception: groups, which proto3 cannot write, are refused.
// Errors: kInvalidArgument naming the byte at which the message stops making sense.
absl::StatusOr<AttendMessage> ParseAttendRequest(const grpc::ByteBuffer& buffer);

// A tensor of an answer: its bytes leave as `data`, uncopied.
struct ReplyTensor {
  v1::DataType dtype = v1::DATA_TYPE_UNSPECIFIED;
  std::vector<int64_t> shape;
  std::vector<grpc::Slice> data;
};

// A slice over `bytes`, which `owner` keeps alive until the transport has sent them.
grpc::Slice ShareBytes(std::shared_ptr<const void> owner, absl::Span<const std::byte> bytes);

// The message whose fields are `header`'s, which leaves o and lse unset, and the two tensors; null:
// the field stays absent.
grpc::ByteBuffer BuildAttendReply(const v1::AttendResponse& header, const ReplyTensor* o,
                                  const ReplyTensor* lse);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_WIRE_H_

#ifndef ADAATTN_SERVER_ATTEND_REACTORS_H_
#define ADAATTN_SERVER_ATTEND_REACTORS_H_

#include <grpcpp/grpcpp.h>

#include "server/call.h"

namespace adaattn {

// One Attend call. The reactor deletes itself.
grpc::ServerUnaryReactor* NewAttendReactor(grpc::CallbackServerContext* context,
                                           const ServiceContext* service,
                                           const grpc::ByteBuffer* request,
                                           grpc::ByteBuffer* response);

// One AttendStream call: messages are scheduled as they come, up to a window, and answered in their
// order. When the client goes away, what is queued runs to its end and is dropped.
grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* NewAttendStreamReactor(
    grpc::CallbackServerContext* context, const ServiceContext* service);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_ATTEND_REACTORS_H_

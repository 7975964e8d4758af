#ifndef ADAATTN_SERVER_CALL_TRACE_H_
#define ADAATTN_SERVER_CALL_TRACE_H_

#include "absl/status/status.h"
#include "server/attention_task.h"
#include "server/call.h"
#include "server/trace.h"

namespace adaattn {

// Records the span of one answered Attend message, where its caller's traceparent asks for it: a
// child per stage, the decisions as attributes. A stage's time is its batch's; the stages are drawn
// one after the other from where the wait in the queue ended, as they run.
void TraceAttend(const ServiceContext& service, const TraceContext& context, RpcMethod method,
                 absl::Time start, const AttentionTask& task);

// The same of a message that was refused before it became a task.
void TraceRefusal(const ServiceContext& service, const TraceContext& context, RpcMethod method,
                  absl::Time start, const absl::Status& status);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_CALL_TRACE_H_

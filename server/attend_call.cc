#include <atomic>
#include <memory>
#include <utility>

#include "server/attend_reactors.h"
#include "server/attend_reply.h"
#include "server/call_trace.h"
#include "server/wire.h"

namespace adaattn {
namespace {

class AttendCall final : public grpc::ServerUnaryReactor {
 public:
  AttendCall(grpc::CallbackServerContext* context, const ServiceContext* service,
             grpc::ByteBuffer* response)
      : context_(context), service_(*service), response_(response), start_(service->clock->Now()) {}

  void Start(const grpc::ByteBuffer& request) {
    const auto bytes = static_cast<int64_t>(request.Length());
    service_.metrics->OnWire(WireDirection::kIn, TransportOf(*context_), bytes);
    const absl::Status status = Schedule(request, bytes);
    if (status.ok()) return;
    TraceRefusal(service_, trace_, RpcMethod::kAttend, start_, status);
    Fail(status, RetryAfter(service_, status));
  }

  void OnCancel() override { cancelled_->store(true); }
  void OnDone() override { delete this; }

 private:
  absl::Status Schedule(const grpc::ByteBuffer& request, int64_t bytes) {
    absl::StatusOr<Caller> caller = MakeCaller(*context_);
    if (!caller.ok()) return caller.status();
    trace_ = caller->trace;
    absl::StatusOr<AdmissionTicket> ticket = service_.admission->AdmitBytes(caller->client, bytes);
    if (!ticket.ok()) return ticket.status();
    ticket_ = *std::move(ticket);
    absl::StatusOr<AttendMessage> message = ParseAttendRequest(request);
    if (!message.ok()) return message.status();
    request_id_ = message->header.request_id();
    absl::StatusOr<std::unique_ptr<AttentionTask>> task =
        ValidateAttend(*std::move(message), *caller, service_.sessions, service_.validation());
    if (!task.ok()) return task.status();
    if ((*task)->payload_owner == nullptr) {
      Answer(MakeUnfoundReply(request_id_, **task));
      return absl::OkStatus();
    }
    (*task)->cancelled = cancelled_;
    (*task)->done = [this](std::unique_ptr<AttentionTask> done) { OnTask(*done); };
    return service_.engine->Schedule(&*task);
  }

  void OnTask(const AttentionTask& task) {
    TraceAttend(service_, trace_, RpcMethod::kAttend, start_, task);
    if (!task.reply.status.ok()) return Fail(task.reply.status, task.reply.retry_after);
    Answer(MakeAttendReply(request_id_, task));
  }

  void Answer(grpc::ByteBuffer reply) {
    service_.metrics->OnWire(WireDirection::kOut, TransportOf(*context_),
                             static_cast<int64_t>(reply.Length()));
    response_->Swap(&reply);
    End(absl::OkStatus());
  }

  void Fail(const absl::Status& status, absl::Duration retry_after) {
    SetRetryAfter(context_, retry_after);
    End(status);
  }

  void End(const absl::Status& status) {
    service_.metrics->OnRequest(RpcMethod::kAttend, static_cast<int>(status.code()),
                                service_.clock->Now() - start_);
    Finish(ToGrpcStatus(status));  // The last access: OnDone deletes this.
  }

  grpc::CallbackServerContext* const context_;
  const ServiceContext& service_;
  grpc::ByteBuffer* const response_;
  const absl::Time start_;
  uint64_t request_id_ = 0;
  TraceContext trace_;
  AdmissionTicket ticket_;
  const std::shared_ptr<std::atomic<bool>> cancelled_ = std::make_shared<std::atomic<bool>>(false);
};

}  // namespace

grpc::ServerUnaryReactor* NewAttendReactor(grpc::CallbackServerContext* context,
                                           const ServiceContext* service,
                                           const grpc::ByteBuffer* request,
                                           grpc::ByteBuffer* response) {
  auto* call = new AttendCall(context, service, response);
  call->Start(*request);  // May end the call; it is deleted only after being returned.
  return call;
}

}  // namespace adaattn

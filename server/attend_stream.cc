#include <atomic>
#include <list>
#include <map>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/attend_reactors.h"
#include "server/attend_reply.h"
#include "server/call_trace.h"
#include "server/wire.h"

namespace adaattn {
namespace {

using Bytes = grpc::ByteBuffer;

// States of a stream: open; ended (the client half-closed); cancelled (it went away). Finish is
// called once, when no message is unanswered and no write is under way, so the engine never holds a
// reactor that is gone. gRPC never runs a reaction inside StartRead or StartWrite: they are called
// under the mutex.
class AttendStreamReactor final : public grpc::ServerBidiReactor<Bytes, Bytes> {
 public:
  AttendStreamReactor(grpc::CallbackServerContext* context, const ServiceContext* service)
      : context_(context), service_(*service), transport_(TransportOf(*context)) {}

  void Start() {
    service_.streams->Add(context_);
    service_.metrics->OnStreams(1);
    absl::StatusOr<Caller> caller = MakeCaller(*context_);
    absl::Status status = caller.status();
    if (caller.ok()) {
      caller_ = *std::move(caller);
      absl::StatusOr<AdmissionTicket> ticket = service_.admission->AdmitStream(caller_.client);
      status = ticket.status();
      if (ticket.ok()) ticket_ = *std::move(ticket);
    }
    if (status.ok()) return Pump();
    SetRetryAfter(context_, RetryAfter(service_, status));
    {
      const MutexLock lock(&mutex_);
      finished_ = true;
    }
    service_.metrics->OnRequest(RpcMethod::kAttendStream, static_cast<int>(status.code()),
                                absl::ZeroDuration());
    Finish(ToGrpcStatus(status));
  }

  void OnReadDone(bool ok) override {
    if (ok) Receive();
    {
      const MutexLock lock(&mutex_);
      reading_ = false;
      if (!ok) {
        ended_ = true;
        FailAllWaitingLocked("the stream ended before k and v came");
      }
    }
    Pump();
  }

  void OnWriteDone(bool ok) override {
    {
      const MutexLock lock(&mutex_);
      writing_ = false;
      cancelled_ = cancelled_ || !ok;
    }
    Pump();
  }

  void OnCancel() override {
    gone_->store(true);
    {
      const MutexLock lock(&mutex_);
      cancelled_ = true;
      FailAllWaitingLocked("the client went away");
    }
    Pump();
  }

  void OnDone() override {
    service_.streams->Remove(context_);
    service_.metrics->OnStreams(-1);
    delete this;
  }

 private:
  // A message that waits for its answer.
  struct Slot {
    uint64_t request_id = 0;
    absl::Time start;
    AdmissionTicket ticket, kv_ticket;
    bool waiting = false;  // for its k and v
    bool ready = false;
    int code = 0;
    Bytes reply;
  };
  // One whose k and v follow.
  struct Waiting {
    Slot* slot = nullptr;
    AttendMessage message;
  };

  // Handles the message in incoming_. Only one read is ever under way.
  void Receive() {
    const auto bytes = static_cast<int64_t>(incoming_.Length());
    service_.metrics->OnWire(WireDirection::kIn, transport_, bytes);
    absl::StatusOr<AdmissionTicket> ticket = service_.admission->AdmitBytes(caller_.client, bytes);
    absl::StatusOr<AttendMessage> message = ParseAttendRequest(incoming_);
    incoming_.Clear();
    const uint64_t id = message.ok() ? message->header.request_id() : 0;
    if (message.ok()) {
      const auto waiting = TakeWaiting(id);
      if (waiting != nullptr) return ReceiveKv(waiting.get(), *std::move(message), &ticket);
    }
    Slot* slot = AddSlot(id);
    if (!ticket.ok()) return Fail(slot, ticket.status());
    slot->ticket = *std::move(ticket);
    if (!message.ok()) return Fail(slot, message.status());
    if (!message->header.kv_follows()) return Schedule(slot, *std::move(message));
    if (message->header.has_k() || message->header.has_v()) {
      return Fail(slot, InvalidField("kv_follows", "true beside k or v",
                                     "false, or k and v must be absent"));
    }
    const MutexLock lock(&mutex_);
    slot->waiting = true;
    waiting_[id] = std::make_unique<Waiting>(Waiting{slot, *std::move(message)});
  }

  void ReceiveKv(Waiting* waiting, AttendMessage kv, absl::StatusOr<AdmissionTicket>* ticket) {
    if (!ticket->ok()) return Fail(waiting->slot, ticket->status());
    waiting->slot->kv_ticket = *std::move(*ticket);
    const v1::AttendRequest& header = kv.header;
    if (header.sequences_size() != 0 || header.has_q() || header.has_options() ||
        header.kv_follows()) {
      return Fail(waiting->slot, InvalidField("kv_follows",
                                              absl::StrCat("a second message ", header.request_id(),
                                                           " with more than k and v"),
                                              "request_id, k and v alone"));
    }
    AttendMessage& message = waiting->message;
    message.header.set_kv_follows(false);
    if (header.has_k()) message.header.mutable_k()->Swap(kv.header.mutable_k());
    if (header.has_v()) message.header.mutable_v()->Swap(kv.header.mutable_v());
    message.k = std::move(kv.k);
    message.v = std::move(kv.v);
    message.kv_slices = std::move(kv.slices);
    Schedule(waiting->slot, std::move(message));
  }

  void Schedule(Slot* slot, AttendMessage message) {
    absl::StatusOr<std::unique_ptr<AttentionTask>> task =
        ValidateAttend(std::move(message), caller_, service_.sessions, service_.validation());
    if (!task.ok()) return Fail(slot, task.status());
    if ((*task)->payload_owner == nullptr) {
      return Answer(slot, 0, MakeUnfoundReply(slot->request_id, **task));
    }
    (*task)->cancelled = gone_;
    (*task)->done = [this, slot](std::unique_ptr<AttentionTask> done) {
      OnTask(slot, *done);
      Pump();
    };
    const absl::Status status = service_.engine->Schedule(&*task);
    if (!status.ok()) Fail(slot, status);
  }

  // On the engine's thread.
  void OnTask(Slot* slot, const AttentionTask& task) {
    TraceAttend(service_, caller_.trace, RpcMethod::kAttendStream, slot->start, task);
    const AttentionReply& reply = task.reply;
    if (reply.status.ok()) return Answer(slot, 0, MakeAttendReply(slot->request_id, task));
    Answer(slot, static_cast<int>(reply.status.code()),
           MakeErrorReply(slot->request_id, reply.status, reply.retry_after));
  }

  void Fail(Slot* slot, const absl::Status& status) {
    TraceRefusal(service_, caller_.trace, RpcMethod::kAttendStream, slot->start, status);
    Answer(slot, static_cast<int>(status.code()),
           MakeErrorReply(slot->request_id, status, RetryAfter(service_, status)));
  }

  void Answer(Slot* slot, int code, Bytes reply) {
    const MutexLock lock(&mutex_);
    slot->code = code;
    slot->reply.Swap(&reply);
    slot->ready = true;
  }

  Slot* AddSlot(uint64_t request_id) {
    const MutexLock lock(&mutex_);
    Slot& slot = slots_.emplace_back();
    slot.request_id = request_id;
    slot.start = service_.clock->Now();
    return &slot;
  }

  std::unique_ptr<Waiting> TakeWaiting(uint64_t request_id) {
    const MutexLock lock(&mutex_);
    const auto found = waiting_.find(request_id);
    if (found == waiting_.end()) return nullptr;
    std::unique_ptr<Waiting> waiting = std::move(found->second);
    waiting->slot->waiting = false;
    waiting_.erase(found);
    return waiting;
  }

  static void FailWaiting(Slot* slot, absl::string_view why) {
    const absl::Status status = absl::InvalidArgumentError(absl::StrCat("kv_follows: ", why));
    slot->code = static_cast<int>(status.code());
    slot->reply = MakeErrorReply(slot->request_id, status, absl::ZeroDuration());
    slot->waiting = false;
    slot->ready = true;
  }

  void FailAllWaitingLocked(absl::string_view why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (auto& [id, waiting] : waiting_) FailWaiting(waiting->slot, why);
    waiting_.clear();
  }

  // Whether another message may be read. A first message whose k and v are still to be read must
  // not stop the reading that brings them; it gets another window of messages, and no more.
  bool MayReadLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const auto window = static_cast<size_t>(service_.options->stream_window);
    if (slots_.size() < window) return true;
    if (!slots_.front().waiting) return false;
    if (slots_.size() < 2 * window) return true;
    waiting_.erase(slots_.front().request_id);
    FailWaiting(&slots_.front(),
                absl::StrCat("k and v did not come within ", 2 * window, " messages"));
    return false;
  }

  // Counts the answer of the first slot and drops it.
  void PopLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const Slot& slot = slots_.front();
    service_.metrics->OnRequest(RpcMethod::kAttendStream, slot.code,
                                service_.clock->Now() - slot.start);
    slots_.pop_front();
  }

  // Starts whatever can be started. Called after every change of state, from any thread.
  void Pump() {
    bool finish = false;
    {
      const MutexLock lock(&mutex_);
      if (finished_) return;
      const bool open = !ended_ && !cancelled_;
      if (open && !reading_ && MayReadLocked()) {
        reading_ = true;
        StartRead(&incoming_);
      }
      while (cancelled_ && !slots_.empty() && slots_.front().ready) PopLocked();
      if (!writing_ && !slots_.empty() && slots_.front().ready) {
        writing_ = true;
        outgoing_.Swap(&slots_.front().reply);
        service_.metrics->OnWire(WireDirection::kOut, transport_,
                                 static_cast<int64_t>(outgoing_.Length()));
        PopLocked();
        StartWrite(&outgoing_);
      }
      finish = !open && slots_.empty() && !writing_ && !reading_;
      finished_ = finish;
    }
    if (finish) Finish(grpc::Status::OK);  // The last access: OnDone deletes this.
  }

  grpc::CallbackServerContext* const context_;
  const ServiceContext& service_;
  const WireTransport transport_;
  Caller caller_;
  AdmissionTicket ticket_;
  Bytes incoming_;  // of the read under way
  Mutex mutex_;
  Bytes outgoing_ ABSL_GUARDED_BY(mutex_);         // of the write under way
  std::list<Slot> slots_ ABSL_GUARDED_BY(mutex_);  // unanswered, in the order of arrival
  std::map<uint64_t, std::unique_ptr<Waiting>> waiting_ ABSL_GUARDED_BY(mutex_);
  bool reading_ ABSL_GUARDED_BY(mutex_) = false;
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  const std::shared_ptr<std::atomic<bool>> gone_ = std::make_shared<std::atomic<bool>>(false);
};

}  // namespace

grpc::ServerBidiReactor<Bytes, Bytes>* NewAttendStreamReactor(grpc::CallbackServerContext* context,
                                                              const ServiceContext* service) {
  auto* reactor = new AttendStreamReactor(context, service);
  reactor->Start();
  return reactor;
}

}  // namespace adaattn

#include <atomic>
#include <memory>
#include <utility>

#include "server/kv_reactors.h"

namespace adaattn {
namespace {

constexpr int kMaxChunksInFlight = 4;

// Reads a chunk, schedules it, reads the next. Finish is called once, when no chunk is in flight
// and no read is under way.
class ImportReactor final : public grpc::ServerReadReactor<v1::ImportKvRequest> {
 public:
  ImportReactor(grpc::CallbackServerContext* context, const ServiceContext* service,
                v1::ImportKvResponse* response)
      : context_(context), service_(*service), response_(response), start_(service->clock->Now()) {}

  void Start() {
    service_.streams->Add(context_);
    absl::StatusOr<Caller> caller = MakeCaller(*context_);
    absl::Status status = caller.status();
    if (caller.ok()) {
      caller_ = *std::move(caller);
      absl::StatusOr<AdmissionTicket> ticket = service_.admission->AdmitStream(caller_.client);
      status = ticket.status();
      if (ticket.ok()) ticket_ = *std::move(ticket);
    }
    SetError(status, RetryAfter(service_, status));
    Pump();
  }

  void OnReadDone(bool ok) override {
    if (ok) Receive();
    {
      const MutexLock lock(&mutex_);
      reading_ = false;
      ended_ = ended_ || !ok;
    }
    Pump();
  }

  void OnCancel() override {
    gone_->store(true);
    SetError(absl::CancelledError("the client went away"), {});
  }

  void OnDone() override {
    service_.streams->Remove(context_);
    delete this;
  }

 private:
  void Receive() {
    const auto bytes = static_cast<int64_t>(incoming_.ByteSizeLong());
    service_.metrics->OnWire(WireDirection::kIn, TransportOf(*context_), bytes);
    auto request = std::make_shared<v1::ImportKvRequest>();
    request->Swap(&incoming_);
    const absl::Status status = Schedule(request, bytes);
    if (!status.ok()) SetError(status, RetryAfter(service_, status));
  }

  absl::Status FindSession(const v1::ImportKvRequest& request) {
    if (session_ == nullptr || !request.session_id().empty()) {
      if (session_ != nullptr && request.session_id() != session_->id()) {
        return InvalidField("session_id", request.session_id(),
                            "that of the stream's first message");
      }
      auto session = service_.sessions->Find(
          request.session_id(), session_ == nullptr ? request.epoch() : session_->epoch(),
          caller_.tenant);
      if (!session.ok()) return session.status();
      session_ = *std::move(session);
    }
    session_->Renew(service_.clock->Now());
    return absl::OkStatus();
  }

  // Basis and query sample go to the engine ahead of the chunk's tokens.
  absl::Status PostExtras(const v1::ImportKvRequest& request) {
    const AttentionShape& shape = session_->config().shape;
    const int32_t layer = request.first_layer();
    if (request.has_basis() || request.has_basis_mean()) {
      const int64_t mean_shape[] = {shape.num_kv_heads, shape.head_dim};
      const int64_t basis_shape[] = {shape.num_kv_heads, shape.head_dim, shape.head_dim};
      auto mean = Floats("basis_mean", request.basis_mean(), mean_shape);
      if (!mean.ok()) return mean.status();
      auto basis = Floats("basis", request.basis(), basis_shape);
      if (!basis.ok()) return basis.status();
      Post([this, layer, mean = *std::move(mean), basis = *std::move(basis)] {
        return service_.engine->control()->LoadBasis(session_.get(), layer, mean, basis);
      });
    }
    if (request.has_query_sample()) {
      const v1::Tensor& sample = request.query_sample();
      const int64_t rows = sample.shape_size() == 3 ? sample.shape(0) : 0;
      const int64_t sample_shape[] = {rows, shape.num_q_heads, shape.head_dim};
      auto floats = Floats("query_sample", sample, sample_shape);
      if (!floats.ok()) return floats.status();
      Post([this, layer, floats = *std::move(floats)] {
        return service_.engine->control()->AddQuerySample(session_.get(), layer, floats);
      });
    }
    return absl::OkStatus();
  }

  static absl::StatusOr<std::vector<float>> Floats(absl::string_view field,
                                                   const v1::Tensor& tensor,
                                                   absl::Span<const int64_t> shape) {
    const absl::Status status = CheckTensor(
        field, tensor, static_cast<int64_t>(tensor.data().size()), shape, /*allow_fp8=*/false);
    return status.ok() ? TensorFloats(field, tensor) : status;
  }

  template <typename Work>
  void Post(Work work) {
    Begin();
    const bool posted = service_.engine->Post([this, work = std::move(work)] { End(work()); });
    if (!posted) End(absl::UnavailableError("draining: this server takes no new work"));
  }

  absl::Status Schedule(const std::shared_ptr<v1::ImportKvRequest>& request, int64_t bytes) {
    {
      const MutexLock lock(&mutex_);
      if (!error_.ok()) return absl::OkStatus();  // The rest of a failed import is not looked at.
    }
    absl::StatusOr<AdmissionTicket> ticket = service_.admission->AdmitBytes(caller_.client, bytes);
    if (!ticket.ok()) return ticket.status();
    absl::Status status = FindSession(*request);
    if (!status.ok()) return status;
    wait_sealed_ = wait_sealed_ || request->wait_sealed();
    const bool without_tokens = !request->has_k() && !request->has_v() &&
                                (request->wait_sealed() || request->has_query_sample() ||
                                 request->has_basis() || request->has_basis_mean());
    if (without_tokens) return PostExtras(*request);
    absl::StatusOr<std::unique_ptr<AttentionTask>> task =
        ValidateImport(request, session_, caller_);
    if (!task.ok()) return task.status();
    status = PostExtras(*request);
    if (!status.ok()) return status;
    (*task)->cancelled = gone_;
    auto kept = std::make_shared<AdmissionTicket>(*std::move(ticket));
    (*task)->done = [this, kept](std::unique_ptr<AttentionTask> done) {
      absl::Status outcome = done->reply.status;
      if (outcome.ok()) outcome = done->reply.sequences[0].status;
      End(outcome);
    };
    Begin();
    status = service_.engine->Schedule(&*task);
    if (!status.ok()) End(status);
    return absl::OkStatus();
  }

  void Begin() {
    const MutexLock lock(&mutex_);
    ++in_flight_;
  }
  // Of one piece of work; on the engine's thread, mostly.
  void End(const absl::Status& status) {
    SetError(status, RetryAfter(service_, status));
    {
      const MutexLock lock(&mutex_);
      --in_flight_;
    }
    Pump();
  }

  // The first error stays.
  void SetError(const absl::Status& status, absl::Duration retry_after) {
    const MutexLock lock(&mutex_);
    if (status.ok() || !error_.ok()) return;
    error_ = status;
    retry_after_ = retry_after;
  }

  void Pump() {
    bool finish = false, lengths = false;
    {
      const MutexLock lock(&mutex_);
      if (finished_) return;
      const bool open = !ended_ && error_.ok();
      if (open && !reading_ && in_flight_ < kMaxChunksInFlight) {
        reading_ = true;
        StartRead(&incoming_);
      }
      finish = !open && in_flight_ == 0 && !reading_;
      if (finish && error_.ok() && session_ == nullptr) {
        error_ = InvalidField("stream", "no message", "at least one message long");
      }
      lengths = finish && error_.ok();
      finished_ = finish;
    }
    if (lengths) return FinishWithLengths();
    if (finish) FinishNow();
  }

  void FinishWithLengths() {
    const bool posted = service_.engine->Post([this] {
      if (!wait_sealed_) return AnswerLengths(absl::OkStatus());
      service_.engine->WhenSealed(session_, gone_,
                                  [this](const absl::Status& status) { AnswerLengths(status); });
    });
    if (posted) return;
    SetError(absl::UnavailableError("draining: the import is done, its lengths are not known"), {});
    FinishNow();
  }

  // On the engine's thread.
  void AnswerLengths(const absl::Status& status) {
    SetError(status, RetryAfter(service_, status));
    if (status.ok()) {
      for (const int64_t length : service_.engine->control()->Lengths(*session_)) {
        response_->add_kv_len(length);
      }
    }
    FinishNow();
  }

  void FinishNow() {
    absl::Status status;
    {
      const MutexLock lock(&mutex_);
      status = error_;
      SetRetryAfter(context_, retry_after_);
    }
    service_.metrics->OnRequest(RpcMethod::kImportKv, static_cast<int>(status.code()),
                                service_.clock->Now() - start_);
    Finish(ToGrpcStatus(status));  // The last access: OnDone deletes this.
  }

  grpc::CallbackServerContext* const context_;
  const ServiceContext& service_;
  v1::ImportKvResponse* const response_;
  const absl::Time start_;
  Caller caller_;
  AdmissionTicket ticket_;
  v1::ImportKvRequest incoming_;      // of the read under way
  std::shared_ptr<Session> session_;  // set by the first message
  bool wait_sealed_ = false;          // some message asked for it
  const std::shared_ptr<std::atomic<bool>> gone_ = std::make_shared<std::atomic<bool>>(false);
  Mutex mutex_;
  int in_flight_ ABSL_GUARDED_BY(mutex_) = 0;
  bool reading_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status error_ ABSL_GUARDED_BY(mutex_);
  absl::Duration retry_after_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

grpc::ServerReadReactor<v1::ImportKvRequest>* NewImportReactor(grpc::CallbackServerContext* context,
                                                               const ServiceContext* service,
                                                               v1::ImportKvResponse* response) {
  auto* reactor = new ImportReactor(context, service, response);
  reactor->Start();
  return reactor;
}

}  // namespace adaattn

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/format/float_types.h"
#include "server/kv_reactors.h"

namespace adaattn {
namespace {

constexpr int64_t kChunkFloats = int64_t{1} << 18;  // of k; as many of v

void SetData(const std::vector<float>& floats, v1::DataType dtype, v1::Tensor* tensor) {
  std::string* data = tensor->mutable_data();
  const size_t size = dtype == v1::DATA_TYPE_FP32 ? 4 : 2;
  data->resize(floats.size() * size);
  if (size == 4) {
    std::memcpy(data->data(), floats.data(), data->size());
    return;
  }
  for (size_t i = 0; i < floats.size(); ++i) {
    const uint16_t bits =
        dtype == v1::DATA_TYPE_BF16 ? ToBf16(floats[i]).bits : ToFp16(floats[i]).bits;
    std::memcpy(data->data() + i * size, &bits, sizeof(bits));
  }
}

class ExportReactor final : public grpc::ServerWriteReactor<v1::ExportKvResponse> {
 public:
  ExportReactor(grpc::CallbackServerContext* context, const ServiceContext* service,
                const v1::ExportKvRequest* request)
      : context_(context), service_(*service), request_(*request), start_(service->clock->Now()) {}

  void Start() {
    service_.streams->Add(context_);
    absl::Status status = Prepare();
    if (!status.ok()) return End(status);
    PostNext();
  }
  void OnWriteDone(bool ok) override {
    if (!ok) return End(absl::CancelledError("the client went away"));
    PostNext();
  }
  void OnDone() override {
    service_.streams->Remove(context_);
    delete this;
  }

 private:
  absl::Status Prepare() {
    absl::StatusOr<Caller> caller = MakeCaller(*context_);
    if (!caller.ok()) return caller.status();
    auto session = service_.sessions->Find(request_.session().session_id(),
                                           request_.session().epoch(), caller->tenant);
    if (!session.ok()) return session.status();
    session_ = *std::move(session);
    const SessionConfig& config = session_->config();
    const int32_t layers = request_.num_layers() == 0 ? config.num_layers - request_.first_layer()
                                                      : request_.num_layers();
    for (const absl::Status& status :
         {CheckRange<int32_t>("first_layer", request_.first_layer(), 0, config.num_layers - 1),
          CheckRange<int32_t>("num_layers", layers, 1, config.num_layers - request_.first_layer()),
          CheckRange<int64_t>("begin", request_.begin(), 0, kMaxPosition),
          CheckRange<int64_t>("end", request_.end(), 0, kMaxPosition)}) {
      if (!status.ok()) return status;
    }
    switch (request_.dtype()) {
      case v1::DATA_TYPE_UNSPECIFIED:
        dtype_ = v1::DATA_TYPE_FP32;
        break;
      case v1::DATA_TYPE_FP32:
      case v1::DATA_TYPE_FP16:
      case v1::DATA_TYPE_BF16:
        dtype_ = request_.dtype();
        break;
      default:
        return InvalidField("dtype", absl::StrCat(request_.dtype()), "FP32, FP16 or BF16");
    }
    layer_ = request_.first_layer();
    end_layer_ = layer_ + layers;
    position_ = std::max(request_.begin(), config.start_position);
    return absl::OkStatus();
  }

  void PostNext() {
    if (!service_.engine->Post([this] { SendNext(); })) {
      End(absl::UnavailableError("draining: this server takes no new work"));
    }
  }

  // On the engine's thread: the next chunk, or the end.
  void SendNext() {
    const SessionConfig& config = session_->config();
    SessionControl* control = service_.engine->control();
    const int64_t length =
        control->Lengths(*session_)[static_cast<size_t>(layer_)] + config.start_position;
    const int64_t end = request_.end() == 0 ? length : request_.end();
    const int64_t row = int64_t{config.shape.num_kv_heads} * config.shape.head_dim;
    const int64_t count =
        std::min(std::max<int64_t>(1, kChunkFloats / row), std::max<int64_t>(0, end - position_));
    std::vector<float> k(static_cast<size_t>(count * row)), v(k.size());
    const absl::Status status = control->Export(*session_, layer_, position_, position_ + count,
                                                absl::MakeSpan(k), absl::MakeSpan(v));
    if (!status.ok()) return End(status);
    if (count == 0 || position_ + count >= end) {
      FillResponse(count, k, v);
      position_ = std::max(request_.begin(), config.start_position);
      if (++layer_ < end_layer_) return StartWrite(&response_);
      service_.metrics->OnRequest(RpcMethod::kExportKv, 0, service_.clock->Now() - start_);
      return StartWriteAndFinish(&response_, grpc::WriteOptions(), grpc::Status::OK);
    }
    FillResponse(count, k, v);
    position_ += count;
    StartWrite(&response_);
  }

  void FillResponse(int64_t count, const std::vector<float>& k, const std::vector<float>& v) {
    const AttentionShape& shape = session_->config().shape;
    response_.Clear();
    response_.set_layer(layer_);
    response_.set_position(position_);
    for (auto [floats, tensor] :
         {std::make_pair(&k, response_.mutable_k()), std::make_pair(&v, response_.mutable_v())}) {
      tensor->set_dtype(dtype_);
      for (const int64_t size : {count, int64_t{shape.num_kv_heads}, int64_t{shape.head_dim}}) {
        tensor->add_shape(size);
      }
      SetData(*floats, dtype_, tensor);
    }
  }

  void End(const absl::Status& status) {
    service_.metrics->OnRequest(RpcMethod::kExportKv, static_cast<int>(status.code()),
                                service_.clock->Now() - start_);
    Finish(ToGrpcStatus(status));
  }

  grpc::CallbackServerContext* const context_;
  const ServiceContext& service_;
  const v1::ExportKvRequest request_;
  const absl::Time start_;
  std::shared_ptr<Session> session_;
  v1::DataType dtype_ = v1::DATA_TYPE_FP32;
  int32_t layer_ = 0;
  int32_t end_layer_ = 0;
  int64_t position_ = 0;
  v1::ExportKvResponse response_;  // of the write under way
};

}  // namespace

grpc::ServerWriteReactor<v1::ExportKvResponse>* NewExportReactor(
    grpc::CallbackServerContext* context, const ServiceContext* service,
    const v1::ExportKvRequest* request) {
  auto* reactor = new ExportReactor(context, service, request);
  reactor->Start();
  return reactor;
}

}  // namespace adaattn

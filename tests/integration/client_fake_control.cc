#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_builder.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "tests/integration/client_fake_service.h"

namespace adaattn::client {

void SetFloats(const std::vector<float>& values, const std::vector<int64_t>& shape,
               v1::Tensor* tensor) {
  tensor->set_dtype(v1::DATA_TYPE_FP32);
  tensor->mutable_shape()->Assign(shape.begin(), shape.end());
  tensor->set_data(values.data(), values.size() * sizeof(float));
}

grpc::Status Fail(const Fault& fault, grpc::ServerContext* context) {
  if (fault.retry_after_ms > 0) {
    context->AddTrailingMetadata("adaattn-retry-after-seconds",
                                 absl::StrCat(fault.retry_after_ms * 1e-3));
  }
  return grpc::Status(static_cast<grpc::StatusCode>(fault.code), "told to fail");
}

grpc::Status NotFound() { return grpc::Status(grpc::StatusCode::NOT_FOUND, "unknown session"); }

grpc::Status FakeService::TruncateSession(grpc::ServerContext*,
                                          const v1::TruncateSessionRequest* request,
                                          v1::TruncateSessionResponse* response) {
  absl::MutexLock lock(&mutex_);
  const auto found = sessions_.find(request->session().session_id());
  if (found == sessions_.end()) return NotFound();
  const v1::ModelShape& model = found->second.options.model();
  const int64_t length = request->position() - found->second.options.start_position();
  for (Layer& layer : found->second.layers) {
    layer.length = length;
    layer.k.resize(length * model.num_kv_heads() * model.head_dim());
    layer.v.resize(layer.k.size());
  }
  response->set_kv_len(length);
  return grpc::Status::OK;
}

grpc::Status FakeService::ForkSession(grpc::ServerContext*, const v1::ForkSessionRequest* request,
                                      v1::ForkSessionResponse* response) {
  absl::MutexLock lock(&mutex_);
  const auto found = sessions_.find(request->session().session_id());
  if (found == sessions_.end()) return NotFound();
  const Session source = found->second;
  for (int32_t i = 0; i < std::max(1, request->count()); ++i) {
    v1::SessionRef* branch = response->add_sessions();
    branch->set_session_id(absl::StrCat("fake-", ++next_id_));
    branch->set_epoch(7);
    sessions_[branch->session_id()] = source;
  }
  response->set_lease_seconds(60);
  return grpc::Status::OK;
}

grpc::Status FakeService::ExportKv(grpc::ServerContext*, const v1::ExportKvRequest* request,
                                   grpc::ServerWriter<v1::ExportKvResponse>* writer) {
  absl::MutexLock lock(&mutex_);
  const auto found = sessions_.find(request->session().session_id());
  if (found == sessions_.end()) return NotFound();
  const v1::ModelShape& model = found->second.options.model();
  const Layer& layer = found->second.layers.at(request->first_layer());
  const int64_t row = model.num_kv_heads() * model.head_dim();
  const int64_t end = request->end() > 0 ? request->end() : layer.length;
  for (int64_t t = request->begin(); t < end; ++t) {
    v1::ExportKvResponse chunk;
    chunk.set_layer(request->first_layer());
    chunk.set_position(t);
    const auto cut = [&](const std::vector<float>& all) {
      return std::vector<float>(all.begin() + t * row, all.begin() + (t + 1) * row);
    };
    SetFloats(cut(layer.k), {1, model.num_kv_heads(), model.head_dim()}, chunk.mutable_k());
    SetFloats(cut(layer.v), {1, model.num_kv_heads(), model.head_dim()}, chunk.mutable_v());
    writer->Write(chunk);
  }
  return grpc::Status::OK;
}

grpc::Status FakeService::CloseSession(grpc::ServerContext*, const v1::CloseSessionRequest* request,
                                       v1::CloseSessionResponse*) {
  absl::MutexLock lock(&mutex_);
  sessions_.erase(request->session().session_id());
  return grpc::Status::OK;
}

grpc::Status FakeService::KeepAlive(grpc::ServerContext*, const v1::KeepAliveRequest* request,
                                    v1::KeepAliveResponse* response) {
  absl::MutexLock lock(&mutex_);
  for (const v1::SessionRef& session : request->sessions()) {
    auto* lease = response->add_leases();
    lease->set_session_id(session.session_id());
    if (sessions_.count(session.session_id()) > 0) {
      lease->set_lease_seconds(60);
    } else {
      lease->set_code(grpc::StatusCode::NOT_FOUND);
      lease->set_message("unknown session");
    }
  }
  return grpc::Status::OK;
}

grpc::Status FakeService::ListSessions(grpc::ServerContext*, const v1::ListSessionsRequest* request,
                                       v1::ListSessionsResponse* response) {
  absl::MutexLock lock(&mutex_);
  // One session a page, so that clients have to follow the tokens.
  const auto next = sessions_.upper_bound(request->page_token());
  if (next == sessions_.end()) return grpc::Status::OK;
  v1::SessionSummary* summary = response->add_sessions();
  summary->set_session_id(next->first);
  summary->set_epoch(7);
  *summary->mutable_model() = next->second.options.model();
  summary->set_kv_len(next->second.layers[0].length);
  if (std::next(next) != sessions_.end()) response->set_next_page_token(next->first);
  return grpc::Status::OK;
}

grpc::Status FakeService::GetServerInfo(grpc::ServerContext* context,
                                        const v1::GetServerInfoRequest*,
                                        v1::GetServerInfoResponse* response) {
  NoteRoute(*context);
  Fault fault;
  if (TakeFault(&fault)) return Fail(fault, context);
  response->set_version("fake");
  response->add_head_dims(64);
  response->add_modes(v1::MODE_EXACT);
  response->set_max_message_bytes(kMaxMessageBytes);
  return grpc::Status::OK;
}

FakeServer::FakeServer() {
  char name[] = "/tmp/adaattn-client-XXXXXX";
  directory_ = mkdtemp(name);
  address_ = absl::StrCat("unix:", directory_, "/socket");
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address_, grpc::InsecureServerCredentials());
  builder.RegisterService(&service_);
  server_ = builder.BuildAndStart();
}

FakeServer::~FakeServer() {
  server_->Shutdown(std::chrono::system_clock::now());
  (void)unlink(absl::StrCat(directory_, "/socket").c_str());
  (void)rmdir(directory_.c_str());
}

}  // namespace adaattn::client

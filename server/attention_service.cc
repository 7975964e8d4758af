#include "server/attention_service.h"

#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/attend_reactors.h"
#include "server/kv_reactors.h"
#include "server/log.h"
#include "server/policy_options.h"

namespace adaattn {
namespace {

constexpr int32_t kDefaultListSize = 100, kMaxListSize = 1000;

// One unary call that is not Attend: ends it, counted and timed.
class Call {
 public:
  Call(const ServiceContext& service, grpc::CallbackServerContext* context, RpcMethod method)
      : service_(service),
        context_(context),
        reactor_(context->DefaultReactor()),
        method_(method),
        start_(service.clock->Now()) {}

  grpc::ServerUnaryReactor* Finish(const absl::Status& status) const {
    service_.metrics->OnRequest(method_, static_cast<int>(status.code()),
                                service_.clock->Now() - start_);
    SetRetryAfter(context_, RetryAfter(service_, status));
    reactor_->Finish(ToGrpcStatus(status));
    return reactor_;
  }

  // Runs `work`, which returns the call's status, on the engine's thread.
  template <typename Work>
  grpc::ServerUnaryReactor* FinishOnEngine(Work work) const {
    const bool posted =
        service_.engine->Post([call = *this, work = std::move(work)] { call.Finish(work()); });
    if (posted) return reactor_;
    return Finish(absl::UnavailableError("draining: this server takes no new work"));
  }

 private:
  const ServiceContext& service_;
  grpc::CallbackServerContext* context_;
  grpc::ServerUnaryReactor* reactor_;
  RpcMethod method_;
  absl::Time start_;
};

absl::StatusOr<std::shared_ptr<Session>> FindSession(const ServiceContext& service,
                                                     const grpc::CallbackServerContext& context,
                                                     const v1::SessionRef& ref) {
  absl::StatusOr<Caller> caller = MakeCaller(context);
  if (!caller.ok()) return caller.status();
  return service.sessions->Find(ref.session_id(), ref.epoch(), caller->tenant);
}

absl::Status RefuseWhenDraining(const ServiceContext& service) {
  if (!service.refuse_sessions->load() && !service.admission->draining()) return absl::OkStatus();
  return absl::UnavailableError("draining: this server opens no new sessions");
}

double LeaseLeft(const ServiceContext& service, const Session& session) {
  return absl::ToDoubleSeconds(session.LeaseLeft(service.clock->Now()));
}

void FillModel(const AttentionShape& shape, int32_t num_layers, v1::ModelShape* model) {
  model->set_num_layers(num_layers);
  model->set_num_q_heads(shape.num_q_heads);
  model->set_num_kv_heads(shape.num_kv_heads);
  model->set_head_dim(shape.head_dim);
}

void FillProfileInfo(const ModelProfile& profile, v1::GetProfileResponse* response) {
  FillModel(profile.shape, profile.num_layers, response->mutable_model());
  response->set_bytes(profile.bytes());
  response->set_has_basis(!profile.basis.empty());
  response->set_has_policy(profile.theta_model.has_value());
  const std::vector<PredictionAudits> audits = profile.audits->Heads();
  for (size_t i = 0; i < audits.size(); ++i) {
    const float factor = profile.error_factors.empty() ? 1.0f : profile.error_factors[i];
    response->add_error_factors(factor);
    response->add_audits(audits[i].count);
    response->add_audited_error_factors(ErrorFactor(audits[i], factor));
  }
}

void FillSummary(const ServiceContext& service, const SessionFacts& facts,
                 v1::SessionSummary* summary) {
  const Session& session = *facts.session;
  const SessionConfig& config = session.config();
  summary->set_session_id(session.id());
  summary->set_epoch(session.epoch());
  FillModel(config.shape, config.num_layers, summary->mutable_model());
  summary->mutable_model()->set_softmax_scale(config.softmax_scale);
  summary->set_page_format(ToProto(config.format));
  summary->set_element_type(ToProto(DenseDType(config.format)));
  summary->set_kv_len(facts.kv_len);
  summary->set_pages_dense(facts.pages_dense);
  summary->set_pages_sealed(facts.pages_sealed);
  summary->set_pages_exact(facts.pages_exact);
  summary->set_bytes(facts.bytes);
  summary->set_exact_tier_bytes(facts.exact_tier_bytes);
  summary->set_age_seconds(absl::ToDoubleSeconds(service.clock->Now() - session.opened()));
  summary->set_lease_seconds(LeaseLeft(service, session));
  summary->set_basis_drift_ratio(facts.drift_ratio);
}

void FillServerInfo(const ServiceContext& service, v1::GetServerInfoResponse* info) {
  const BackendInfo& backend = service.engine->backend_info();
  const ServerOptions& options = *service.options;
  info->set_version(service.info.version);
  info->set_build(absl::StrCat(service.info.commit, " ", service.info.compiler));
  info->set_instance(service.sessions->instance());
  info->set_backend(backend.name);
  info->set_device(backend.device);
  info->set_kernels(backend.kernels);
  for (const int32_t dim : backend.head_dims) info->add_head_dims(dim);
  for (const PageFormat format : backend.formats) {
    if (format == PageFormat::kProgressiveF16) continue;  // An element type of PROGRESSIVE.
    info->add_page_formats(ToProto(format));
    if (options.default_page_format == PageFormatName(format)) {
      info->set_default_page_format(ToProto(format));
    }
  }
  for (const v1::Mode mode :
       {v1::MODE_EXACT, v1::MODE_FULL_DEPTH, v1::MODE_STATISTICAL, v1::MODE_STATIC}) {
    info->add_modes(mode);
  }
  if (backend.bounds_errors) {
    info->add_modes(v1::MODE_DETERMINISTIC);
  } else {
    info->add_unsupported("MODE_DETERMINISTIC");
  }
  if (backend.exact_tier_bytes == 0) info->add_unsupported("EXACT_TIER_HOST_PAGES");
  for (const Policy policy : backend.policies) {
    if (UsesLadder(policy)) info->add_policies(ToProto(policy));
  }
  info->add_transports(v1::TRANSPORT_GRPC_BYTES);
  info->set_max_group_size(backend.max_group_size);
  info->set_max_q_len(backend.max_q_len);
  const PageStats pages = service.engine->page_stats();
  info->set_pool_bytes(pages.pool_bytes);
  info->set_pool_bytes_free(pages.free_bytes);
  info->set_exact_tier_bytes(pages.exact_tier_bytes);
  info->set_exact_tier_bytes_free(pages.exact_tier_free_bytes);
  info->set_max_message_bytes(options.max_message_bytes);
  info->set_max_tokens_per_session(options.max_tokens_per_session);
  info->set_max_sessions(options.sessions.max_sessions);
  info->set_default_lease_seconds(absl::ToDoubleSeconds(options.default_lease));
  for (const char* feature : {"Tensor.shared_memory", "MLA layouts", "learned attention sinks"}) {
    info->add_unsupported(feature);
  }
  info->set_tuning(backend.tuning);
}

}  // namespace

grpc::ServerUnaryReactor* AttentionService::Attend(grpc::CallbackServerContext* context,
                                                   const grpc::ByteBuffer* request,
                                                   grpc::ByteBuffer* response) {
  return NewAttendReactor(context, &service_, request, response);
}

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* AttentionService::AttendStream(
    grpc::CallbackServerContext* context) {
  return NewAttendStreamReactor(context, &service_);
}

grpc::ServerReadReactor<v1::ImportKvRequest>* AttentionService::ImportKv(
    grpc::CallbackServerContext* context, v1::ImportKvResponse* response) {
  return NewImportReactor(context, &service_, response);
}

grpc::ServerWriteReactor<v1::ExportKvResponse>* AttentionService::ExportKv(
    grpc::CallbackServerContext* context, const v1::ExportKvRequest* request) {
  return NewExportReactor(context, &service_, request);
}

grpc::ServerUnaryReactor* AttentionService::OpenSession(grpc::CallbackServerContext* context,
                                                        const v1::OpenSessionRequest* request,
                                                        v1::OpenSessionResponse* response) {
  const Call call(service_, context, RpcMethod::kOpenSession);
  absl::Status status = RefuseWhenDraining(service_);
  if (!status.ok()) return call.Finish(status);
  absl::StatusOr<Caller> caller = MakeCaller(*context);
  if (!caller.ok()) return call.Finish(caller.status());
  absl::StatusOr<SessionConfig> config =
      ValidateOpenSession(*request, *caller, *service_.profiles, service_.validation());
  if (!config.ok()) return call.Finish(config.status());
  absl::StatusOr<std::shared_ptr<Session>> session = service_.sessions->Open(*std::move(config));
  if (!session.ok()) return call.Finish(session.status());
  const SessionConfig& granted = (*session)->config();
  response->set_session_id((*session)->id());
  response->set_epoch((*session)->epoch());
  response->set_max_tokens(granted.max_tokens);
  response->set_lease_seconds(absl::ToDoubleSeconds(granted.lease));
  response->set_page_format(ToProto(granted.format));
  response->set_element_type(ToProto(DenseDType(granted.format)));
  response->set_transport(v1::TRANSPORT_GRPC_BYTES);
  response->set_max_message_bytes(service_.options->max_message_bytes);
  service_.metrics->OnSessionEvent(SessionEvent::kOpened, 1);
  return call.Finish(absl::OkStatus());
}

grpc::ServerUnaryReactor* AttentionService::TruncateSession(
    grpc::CallbackServerContext* context, const v1::TruncateSessionRequest* request,
    v1::TruncateSessionResponse* response) {
  const Call call(service_, context, RpcMethod::kTruncateSession);
  auto session = FindSession(service_, *context, request->session());
  if (!session.ok()) return call.Finish(session.status());
  return call.FinishOnEngine([this, request, response, session = *session]() -> absl::Status {
    absl::StatusOr<TruncateResult> result =
        service_.engine->control()->Truncate(session.get(), request->position());
    if (!result.ok()) return result.status();
    response->set_kv_len(result->kv_len);
    response->set_pages_reopened(result->pages_reopened);
    service_.metrics->OnSessionEvent(SessionEvent::kTruncated, 1);
    if (result->pages_reopened > 0) service_.metrics->OnSessionEvent(SessionEvent::kReopened, 1);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* AttentionService::ForkSession(grpc::CallbackServerContext* context,
                                                        const v1::ForkSessionRequest* request,
                                                        v1::ForkSessionResponse* response) {
  const Call call(service_, context, RpcMethod::kForkSession);
  absl::Status status = RefuseWhenDraining(service_);
  const int32_t count = request->count() == 0 ? 1 : request->count();
  if (status.ok()) status = CheckRange<int32_t>("count", count, 1, kMaxForks);
  if (!status.ok()) return call.Finish(status);
  auto session = FindSession(service_, *context, request->session());
  if (!session.ok()) return call.Finish(session.status());
  return call.FinishOnEngine([this, count, response, session = *session]() -> absl::Status {
    auto branches = service_.engine->control()->Fork(*session, count);
    if (!branches.ok()) return branches.status();
    for (const std::shared_ptr<Session>& branch : *branches) {
      v1::SessionRef* ref = response->add_sessions();
      ref->set_session_id(branch->id());
      ref->set_epoch(branch->epoch());
    }
    response->set_lease_seconds(absl::ToDoubleSeconds(session->config().lease));
    service_.metrics->OnSessionEvent(SessionEvent::kForked, count);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* AttentionService::CloseSession(grpc::CallbackServerContext* context,
                                                         const v1::CloseSessionRequest* request,
                                                         v1::CloseSessionResponse*) {
  const Call call(service_, context, RpcMethod::kCloseSession);
  absl::StatusOr<Caller> caller = MakeCaller(*context);
  if (!caller.ok()) return call.Finish(caller.status());
  return call.FinishOnEngine([this, request, tenant = caller->tenant]() -> absl::Status {
    const int64_t before = service_.sessions->size();
    absl::Status status = service_.engine->control()->Close(request->session().session_id(),
                                                            request->session().epoch(), tenant);
    if (status.ok() && service_.sessions->size() < before) {
      service_.metrics->OnSessionEvent(SessionEvent::kClosed, 1);
    }
    return status;
  });
}

grpc::ServerUnaryReactor* AttentionService::KeepAlive(grpc::CallbackServerContext* context,
                                                      const v1::KeepAliveRequest* request,
                                                      v1::KeepAliveResponse* response) {
  const Call call(service_, context, RpcMethod::kKeepAlive);
  absl::StatusOr<Caller> caller = MakeCaller(*context);
  if (!caller.ok()) return call.Finish(caller.status());
  for (const v1::SessionRef& ref : request->sessions()) {
    v1::KeepAliveResponse::Lease* lease = response->add_leases();
    lease->set_session_id(ref.session_id());
    auto session = service_.sessions->Find(ref.session_id(), ref.epoch(), caller->tenant);
    if (session.ok()) {
      lease->set_lease_seconds(LeaseLeft(service_, **session));
    } else {
      lease->set_code(static_cast<int32_t>(session.status().code()));
      lease->set_message(std::string(session.status().message()));
    }
  }
  return call.Finish(absl::OkStatus());
}

grpc::ServerUnaryReactor* AttentionService::ListSessions(grpc::CallbackServerContext* context,
                                                         const v1::ListSessionsRequest* request,
                                                         v1::ListSessionsResponse* response) {
  const Call call(service_, context, RpcMethod::kListSessions);
  absl::StatusOr<Caller> caller = MakeCaller(*context);
  if (!caller.ok()) return call.Finish(caller.status());
  const int32_t size = request->page_size() == 0 ? kDefaultListSize : request->page_size();
  const absl::Status status = CheckRange<int32_t>("page_size", size, 1, kMaxListSize);
  if (!status.ok()) return call.Finish(status);
  return call.FinishOnEngine([this, request, response, size, tenant = caller->tenant] {
    const auto list = service_.engine->control()->List(tenant, request->page_token(), size);
    for (const SessionFacts& facts : list) {
      FillSummary(service_, facts, response->add_sessions());
    }
    // The token is the last id: sessions come in the order of their ids.
    if (static_cast<int32_t>(list.size()) == size) {
      response->set_next_page_token(list.back().session->id());
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* AttentionService::UploadProfile(grpc::CallbackServerContext* context,
                                                          const v1::UploadProfileRequest* request,
                                                          v1::UploadProfileResponse* response) {
  const Call call(service_, context, RpcMethod::kUploadProfile);
  absl::StatusOr<Caller> caller = MakeCaller(*context);
  if (!caller.ok()) return call.Finish(caller.status());
  auto profile = ValidateProfile(*request, *caller, *service_.profiles, service_.validation());
  if (!profile.ok()) return call.Finish(profile.status());
  response->set_bytes((*profile)->bytes());
  return call.Finish(service_.profiles->Put(caller->tenant, *std::move(profile)));
}

grpc::ServerUnaryReactor* AttentionService::GetProfile(grpc::CallbackServerContext* context,
                                                       const v1::GetProfileRequest* request,
                                                       v1::GetProfileResponse* response) {
  const Call call(service_, context, RpcMethod::kGetProfile);
  absl::StatusOr<Caller> caller = MakeCaller(*context);
  if (!caller.ok()) return call.Finish(caller.status());
  const auto profile = service_.profiles->Get(caller->tenant, request->name());
  if (profile == nullptr) return call.Finish(NoProfile("name", request->name()));
  FillProfileInfo(*profile, response);
  return call.Finish(absl::OkStatus());
}

grpc::ServerUnaryReactor* AttentionService::GetServerInfo(grpc::CallbackServerContext* context,
                                                          const v1::GetServerInfoRequest*,
                                                          v1::GetServerInfoResponse* response) {
  const Call call(service_, context, RpcMethod::kGetServerInfo);
  FillServerInfo(service_, response);
  return call.Finish(absl::OkStatus());
}

}  // namespace adaattn
